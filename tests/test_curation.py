"""Curation against a plain, slow account of the same rules, on real texts and pictures."""

import collections
import functools
import hashlib
import itertools
import json
import math
import re
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam")
import apache_beam as beam
import imagehash

from clip_jax.data.curation import balance, duplicates, files, pipeline, records, report, shards
from clip_jax.data.curation.matching import Matcher
from clip_jax.data.curation.queries import Origin, Query, QueryRules, read_queries, write_queries
from clip_jax.data.curation.settings import Settings
from clip_jax.data.curation.texts import normal
from clip_jax.data.sources import Pair, open_source
from clip_jax.data.transforms import decode
from clip_jax.errors import DataError, UserError
from flamingo_jax.data.text import open_texts
from launch import prepare

SPEC = "emoji:unseen_concepts_held_out_style"
MARKS = "".join(c for c in map(chr, range(0x3100)) if unicodedata.category(c)[0] == "M")  # those of these texts
HOSTILE = [
    "Catalogue of cats, CAT-like: a cat's (cat) ｃａｔ cat_1 cat2 cat",
    "Straße STRASSE ﬁne  Ⅸ\tnew\u00a0york\nNew York",
    "हिन्दी में लिखा है हिन्द",
    "e\u0301te\u0301 été ete",
    "c++ and c and .net; a.b",
    "",
    "\udcff \x00 cat",
]
WORDS = [
    "cat",
    "cats",
    "strasse",
    "fine",
    "ix",
    "new york",
    "york",
    "हिन्द",
    "हिन्दी",
    "été",
    "ete",
    "c++",
    "c",
    ".net",
    "a.b",
    "1",
]


@pytest.fixture(scope="module")
def glosses() -> list[str]:
    pages = open_texts("wordnet:train")
    return [line for i in range(0, len(pages), 24) for line in pages[i].splitlines()]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    source = open_source(SPEC)
    return [source[i] for i in range(len(source))]


# Queries.


def naive_queries(text: str, queries: list[str], whole_words: bool) -> list[int]:
    text = normal(text)
    if not whole_words:
        return [i for i, query in enumerate(queries) if query in text]
    return [i for i, query in enumerate(queries) if query in text and whole(query).search(text)]


@functools.cache
def whole(query: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w{MARKS}]){re.escape(query)}(?![\w{MARKS}])")


@pytest.mark.parametrize("whole_words", [True, False])
def test_queries_are_found_as_by_regular_expressions(glosses: list[str], whole_words: bool) -> None:
    counts = collections.Counter(word for gloss in glosses for word in re.findall(r"[a-z-]+", gloss))
    queries = [normal(q) for q in [*WORDS, *list(counts)[:250], *(" ".join(g.split()[2:4]) for g in glosses[:50])]]
    queries = list(dict.fromkeys(queries))
    matcher = Matcher(queries, whole_words)
    texts = HOSTILE + glosses[:600]
    found = [matcher.find(text) for text in texts]
    assert found == [naive_queries(text, queries, whole_words) for text in texts]
    assert sum(map(len, found)) > 1000


def test_words_are_whole_in_scripts_with_marks() -> None:
    assert Matcher(["हिन्द", "हिन्दी"], True).find(HOSTILE[2]) == [0, 1]
    assert Matcher(["हिन्द", "हिन्दी"], True).find("हिन्दी") == [1]


def test_queries_of_a_corpus_are_those_counted_by_hand(glosses: list[str], tmp_path: Path) -> None:
    corpus, titles, synsets = (tmp_path / name for name in ("corpus.txt", "titles.txt", "synsets.txt"))
    corpus.write_text("\n".join(glosses[:800]))
    titles.write_text("New York\t900\nOf\t800\nRare Thing\t3\n")
    synsets.write_text("cat, true cat: feline mammal\nnew york\n")
    origin = Origin("", str(corpus), str(titles), 10, str(synsets), QueryRules(10, 1.0, 20))
    pipeline.make_queries(str(tmp_path / "queries.txt"), str(tmp_path / "work"), origin)
    word = rf"[\w{MARKS}]+"
    words, bigrams = collections.Counter[str](), collections.Counter[tuple[str, str]]()
    for gloss in glosses[:800]:
        pieces = re.findall(rf"{word}(?:['’-]{word})*|[^\w]+", normal(gloss))
        words.update(piece for piece in pieces if piece[0].isalnum())
        bigrams.update((a, b) for a, blank, b in zip(pieces, pieces[1:], pieces[2:], strict=False) if blank == " ")
    pmi = {
        pair: math.log2(n * words.total() / (words[pair[0]] * words[pair[1]])) for pair, n in bigrams.items() if n >= 10
    }
    often = sorted((w for w, n in words.items() if n >= 10), key=lambda w: (-words[w], w))
    together = sorted((p for p in pmi if pmi[p] >= 1), key=lambda p: (-pmi[p], " ".join(p)))[:20]
    expected = [Query(w, "word", words[w]) for w in often]
    expected += [Query(" ".join(p), "bigram", bigrams[p]) for p in together]
    expected += [Query("new york", "title", 900), Query("cat", "synset"), Query("true cat", "synset")]
    assert len(together) == 20 and "of" in often
    assert read_queries(str(tmp_path / "queries.txt")) == expected


def test_a_list_of_queries_is_read_in_any_case_each_once(tmp_path: Path) -> None:
    path = tmp_path / "queries.txt"
    path.write_text("New  York\nNEW YORK\r\n\nCat\tword\t7\n")
    assert read_queries(str(path)) == [Query("new york"), Query("cat", "word", 7)]
    write_queries(str(path), [Query("a b", "bigram", 2)])
    assert read_queries(str(path)) == [Query("a b", "bigram", 2)]
    for content, fault in (("\n", "empty"), ("a\tword\tmany\n", "line 1: count 'many'")):
        path.write_text(content)
        with pytest.raises(DataError, match=fault):
            read_queries(str(path))


# Balance.


@pytest.mark.parametrize("rule", balance.RULES)
def test_balance_is_the_same_in_any_order_and_any_parts(rule: str) -> None:
    rng = np.random.default_rng(0)
    n, t = 30_000, 100
    ranks = rng.integers(0, records.RANKS, n)
    lists = [[q for q in range(8) if rng.random() < 0.5**q] for _ in range(n)]
    counts = np.bincount([q for one in lists for q in one], minlength=8)
    if rule == "probability":
        bounds = balance.shares(counts, t)
        expected = [
            bool(q) and int(r) * int(counts[q].min()) <= records.RANKS * t for r, q in zip(ranks, lists, strict=True)
        ]
    else:
        first = {
            q: set(sorted(r for r, qs in zip(ranks.tolist(), lists, strict=True) if q in qs)[:t]) for q in range(8)
        }
        expected = [any(r in first[q] for q in qs) for r, qs in zip(ranks.tolist(), lists, strict=True)]
        bounds = np.full(8, records.RANKS - 1)
        combine, candidates, sent = balance.Smallest(t), balance.candidates(counts, t), 0
        accumulators: dict[int, list[list[np.ndarray]]] = collections.defaultdict(list)
        for part in np.array_split(rng.permutation(n), 7):
            for query, found in balance.by_query(ranks[part], [lists[i] for i in part], candidates):
                accumulators[query].append(combine.add_input(combine.create_accumulator(), found))
                sent += len(found)
        for query, several in accumulators.items():
            bounds[query] = combine.extract_output(combine.merge_accumulators(several[::-1]))[-1]
        assert set(accumulators) == {q for q in range(8) if counts[q] > t}
        assert sent < 8 * 2.5 * t  # of 60,000 matches
    assert balance.kept(ranks, lists, bounds).tolist() == expected
    assert 0 < sum(expected) < n / 10


def test_ranks_are_uniform_and_follow_the_pair(pairs: list[Pair]) -> None:
    ranks = [records.rank(0, pair, records.digest(pair.image)) for pair in pairs]
    u = np.sort(np.array(ranks) / records.RANKS)
    assert np.abs(u - (np.arange(len(u)) + 0.5) / len(u)).max() < 1.63 / math.sqrt(len(u))  # Kolmogorov, 1 %
    assert records.rank(1, pairs[0], records.digest(pairs[0].image)) != ranks[0]


# Duplicates.


@pytest.mark.parametrize(("size", "distance"), [(1, 1), (10**6, 3), (4 * 10**8, 3), (5 * 10**9, 3), (10**9, 8)])
def test_near_hashes_agree_under_one_mask_at_least(size: int, distance: int) -> None:
    rng = np.random.default_rng(0)
    masks = [sum(table) for table in duplicates.plan(size, distance)]
    for _ in range(300):
        difference = sum(1 << int(bit) for bit in rng.choice(64, distance, replace=False))
        assert any(not difference & mask for mask in masks)
    if distance == 3:
        assert size / 2 ** min(mask.bit_count() for mask in masks) <= duplicates.BESIDE


def naive_winners(rows: list[duplicates.Pair], distance: int) -> set[int]:
    return {
        row[1]
        for row in rows
        if not any(
            other[:2] < row[:2] and ((other[4] ^ row[4]) & (1 << 64) - 1).bit_count() <= distance for other in rows
        )
    }


def test_near_duplicates_are_those_found_by_comparing_all(pairs: list[Pair]) -> None:
    rng = np.random.default_rng(0)
    hashes = [records.perceptual_hash(decode(pair.image, pair.key)) for pair in pairs[:100]]
    near = [h ^ (1 << int(bit)) for h in hashes for bit in rng.integers(0, 63, 2)]
    chosen = list(dict.fromkeys([*hashes, *near, *(h ^ 0b111 for h in near), 0, -1, -(1 << 63)]))
    rows = [(int(rng.integers(50)), i, b"", b"", h) for i, h in enumerate(chosen)]
    left: list[duplicates.Pair] = []
    with beam.Pipeline("FnApiRunner") as root:
        found = duplicates.without_near(root | beam.Create(rows), 1 << 30, 3)
        _ = found | beam.Map(lambda row: row[1]) | beam.combiners.ToList() | beam.ParDo(Collect())
    left = COLLECTED.pop()
    assert set(left) == naive_winners(rows, 3)
    assert len(left) < len(rows) / 2


COLLECTED: list[list] = []


class Collect(beam.DoFn):
    def process(self, found: list) -> None:
        COLLECTED.append(found)


# The whole.


def oracle(pairs: list[Pair], queries: list[str], settings: Settings) -> list[tuple[int, list[int]]]:
    """(index, queries) of what stays, by the rules as they are told, with dictionaries and loops."""
    rows = []
    filters = settings.filters
    for index, pair in enumerate(pairs):
        text = " ".join(unicodedata.normalize("NFKC", pair.text).casefold().split())
        if not filters.min_text <= len(text) <= filters.max_text:
            continue
        try:
            image = decode(pair.image, pair.key)
        except UserError:
            continue
        if min(image.size) < filters.min_side or max(image.size) / min(image.size) > filters.max_aspect:
            continue
        image_digest = hashlib.blake2b(pair.image, digest_size=16).digest()
        hashed = hashlib.blake2b(
            pair.key.encode() + b"\0" + pair.text.encode() + b"\0" + image_digest,
            digest_size=8,
            key=str(settings.seed).encode(),
        )
        rows.append((int.from_bytes(hashed.digest()) // 2, index, pair.image, text, imagehash.phash(image)))
    rows.sort(key=lambda row: row[:2])
    for field, most in ((2, 1), (3, settings.max_per_text), (4, 1)):
        seen = collections.Counter[object]()
        kept = []
        for row in rows:
            value = str(row[field]) if field == 4 else row[field]
            seen[value] += 1
            if seen[value] <= most:
                kept.append(row)
        rows = kept
    lost = {b[1] for a, b in itertools.combinations(rows, 2) if a[4] - b[4] <= settings.near_duplicates}
    rows = [row for row in rows if row[1] not in lost]
    lists = {row[1]: naive_queries(row[3], queries, settings.match == "words") for row in rows}
    of_query = collections.defaultdict(list)
    for row in rows:
        for query in lists[row[1]]:
            of_query[query].append(row)
    t, stay = settings.max_per_query, set()
    for found in of_query.values():
        if settings.balance == "cap":
            stay |= {row[1] for row in found[:t]}
        else:
            stay |= {row[1] for row in found if row[0] / 2**63 < t / len(found)}
    return [(index, lists[index]) for index in sorted(stay)]


@pytest.fixture(scope="module")
def folder(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as a folder, with copies, other texts, pictures that are none, and a long one."""
    root = tmp_path_factory.mktemp("pictures")
    for i, pair in enumerate(pairs[:260]):
        (root / f"{i:03}.webp").write_bytes(pair.image)
        (root / f"{i:03}.txt").write_text(f"{pair.text} {'one of many' if i % 3 else ''}")
    (root / "copy.webp").write_bytes(pairs[0].image)
    (root / "broken.webp").write_bytes(pairs[1].image[:200])
    decode(pairs[2].image, "").resize((200, 40)).save(root / "long.png")
    decode(pairs[3].image, "").resize((20, 20)).save(root / "small.png")
    decode(pairs[4].image, "").resize((64, 64)).save(root / "near.jpg", quality=95)
    (root / "empty.png").write_bytes(b"")
    for name in ("copy", "broken", "long", "small", "near", "empty"):
        (root / f"{name}.txt").write_text("a picture, one of many")
    return root


def test_everything_equals_a_naive_account(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both rules, both kinds of matching, other parts and shards; then what the commands leave."""
    source = open_source(f"folder:{folder}")
    pairs = [source[i] for i in range(len(source))]
    words = collections.Counter(word for pair in pairs for word in normal(pair.text).split())
    queries = [word for word, n in words.most_common() if n > 6]
    (tmp_path / "queries.txt").write_text("\n".join(queries))
    arguments = ["curate", "--input", f"folder:{folder}", "--queries", str(tmp_path / "queries.txt")]
    arguments += ["--min-side", "32", "--max-per-query", "5", "--max-per-text", "1", "--min-text", "7"]
    contents = {}
    for name, more in {
        "cap": ["--part", "50", "--shard-size", "40"],
        "probability": ["--balance", "probability", "--match", "substring", "--seed", "5", "--json"],
    }.items():
        prepare.main([*arguments, "--output", str(tmp_path / name), *more])
        settings = Settings(
            "", "", 5, name, "substring" if "--match" in more else "words",
            records.Filters(32, 3.0, 7), 3, 1, 5 if "--seed" in more else 0,
        )  # fmt: skip
        expected = oracle(pairs, queries, settings)
        found = contents[name] = read_shards(tmp_path / name / "shards")
        assert [row["key"] for row in found] == [pairs[i].key for i, _ in expected]
        assert [row["queries"] for row in found] == [[queries[q] for q in qs] for _, qs in expected]
        assert [row["image"] for row in found] == [pairs[i].image for i, _ in expected]
    summary = json.loads((tmp_path / "cap" / "report.json").read_text())
    dropped = summary["dropped"]
    assert (dropped["long_image"], dropped["small_image"], dropped["unreadable_image"]) == (1, 1, 2)
    assert dropped["duplicate_image"] == 1 and dropped["duplicate_text"] > 0 and dropped["duplicate_near"] > 0
    assert dropped["no_query"] > 10 and dropped["balance"] > 50
    assert sum(dropped.values()) + len(contents["cap"]) == len(pairs) == summary["steps"]["read"]
    assert summary["matches"]["kept"]["head"] < summary["matches"]["unique"]["head"]
    assert "data:image/png" in (tmp_path / "cap" / "report.html").read_text()
    *text, figures = capsys.readouterr().out.splitlines()
    assert f"{len(contents['cap']):,} pairs that stay" in " ".join(" ".join(text).split())
    other = json.loads((tmp_path / "probability" / "report.json").read_text())
    assert json.loads(figures) == {key: other[key] for key in ("steps", "dropped")}
    tars = sorted((tmp_path / "cap" / "shards").glob("*.tar"))
    assert len(tars) == -(-len(contents["cap"]) // 40)
    assert {path.name for path in tmp_path.iterdir()} == {"queries.txt", "cap", "probability"}


def read_shards(folder: Path) -> list[dict]:
    rows = []
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, bytes]] = collections.defaultdict(dict)
        with tarfile.open(path) as tar:
            for member in tar:
                name, suffix = member.name.split(".")
                members[name][suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for files_ in members.values():
            row = json.loads(files_.pop("json"))
            assert files_.pop("txt").decode() == row["text"]
            ((_, row["image"]),) = files_.items()
            rows.append(row)
    return rows


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_a_restart_makes_what_is_missing_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    settings = Settings(f"folder:{folder}", str(tmp_path), filters=records.Filters(32), part=100, shard_size=60)
    write_queries(settings.queries, [Query("one of many"), Query("hand")])
    stages = pipeline.curate(settings)
    assert all(stage["again"] for stage in stages.values())
    whole = digests(tmp_path)
    # As a kill would leave it: a part, a shard's list and a later stage's word are not there; a temporary file is.
    for name in ("work/scan/000001.parquet", "shards/00001.parquet", "work/balance/done.json"):
        (tmp_path / name).unlink()
    (tmp_path / "shards" / "00001.tar").write_bytes(b"half")
    (tmp_path / "shards" / ".0.tmp").write_bytes(b"half")
    untouched = (tmp_path / "work/scan/000000.parquet", tmp_path / "shards/00000.tar")
    times = [path.stat().st_mtime_ns for path in untouched]
    stages = pipeline.curate(settings)
    assert [name for name, stage in stages.items() if stage["again"]] == ["scan", "balance", "shards"]
    assert [path.stat().st_mtime_ns for path in untouched] == times
    mine = digests(tmp_path)
    assert {n: d for n, d in mine.items() if "done" not in n} == {n: d for n, d in whole.items() if "done" not in n}
    assert report.summarize(settings, stages)["steps"]["kept"] == stages["shards"]["pairs"]
    with pytest.raises(DataError, match="made with max_per_query 20000, now 7"):
        pipeline.curate(Settings(**{**vars(settings), "max_per_query": 7}))


def test_an_interrupted_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.whole(str(tmp_path / "a")) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_shards_are_full_but_the_last() -> None:
    planned = shards.plan([3, 0, 7, 1], 4)
    assert [sum(s.last - s.first for s in slices) for slices in planned] == [4, 4, 3]
    places = [(s.part, i) for slices in planned for s in slices for i in range(s.first, s.last)]
    assert places == [(0, 0), (0, 1), (0, 2), *((2, i) for i in range(7)), (3, 0)]


def test_what_workers_get_is_picklable_and_small() -> None:
    import pickle

    from clip_jax.data.curation import stages

    settings = Settings("emoji:train", "gs://bucket/out")
    made = [
        stages.Scan(settings, 9),
        stages.Accepted(settings),
        stages.CountQueries(settings),
        stages.Candidates(settings),
    ]
    made += [stages.Balance(settings, 3), stages.WriteShard(settings), duplicates.File(duplicates.plan(9, 3))]
    assert all(len(pickle.dumps(one)) < 2000 for one in made)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ([], "no queries: expected --queries"),
        (["--queries", "missing.txt"], "missing.txt: can't be read"),
        (["--queries", "q", "--corpus", "c"], "--queries is a list"),
        (["--corpus", "missing*.txt"], "missing*.txt: no such file"),
        (["--queries", "q", "--max-per-qeury", "3"], "--max-per-qeury: no such option"),
        (["--queries", "q", "--near-duplicates", "40"], "--near-duplicates 40: expected -1 to 8"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(more: list[str], fault: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare.main(["curate", "--input", SPEC, "--output", str(tmp_path / "out"), *more])
    assert fault in str(caught.value) and "\n" not in str(caught.value)
