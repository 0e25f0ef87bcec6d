"""Published benchmarks in the files they are published in, and one's own as JSON lines: each a list of records.

A benchmark is named `KIND:WHERE` or `KIND:WHERE,SPLIT`; the files that each kind expects stand at its reader. All
of a file is checked before anything is computed: a missing key, answer or picture is one line that names both.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_jax.data.sources import IMAGE_SUFFIXES
from clip_jax.errors import ConfigError, DataError
from clip_jax.evaluation.prompts import imagenet_classes
from clip_jax.files import numbered_lines, read_lines

CAPTIONING, VQA, CLASSIFICATION = "captioning", "vqa", "classification"


@dataclass(frozen=True)
class Record:
    """A picture, what is asked about it, and what is right.

    `targets`: the references of a caption, people's answers to a question, or the one name of a class.
    `question`: of VQA; in classification a text that belongs to the picture, "" where there is none.
    `group`: under which figures are also given, such as a kind of answer; "" for none.
    """

    key: str
    image: Path
    targets: tuple[str, ...]
    question: str = ""
    group: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Records of one kind. `classes`: of a classification, in their order; the last of two is the positive one.

    `prompt`: how a classification is asked, where not by `Output:`; "{}" is the record's question.
    """

    name: str
    kind: str
    records: Sequence[Record]
    classes: tuple[str, ...] = ()
    prompt: str = ""


def open_benchmark(spec: str, *, support: bool = False, classes: Sequence[str] | None = None) -> Benchmark:
    """Opens a benchmark by its name; with `support` the split of it that shots come from, whichever is named.

    Args:
      classes: all of a JSON-lines file's classes, in their order, where its labels are not all of them.

    Raises:
      ConfigError: an unknown kind, or classes for a benchmark that has its own.
      DataError: a file is missing or not of its format, a record lacks something, or there is none.
    """
    kind, _, where = spec.partition(":")
    if kind not in READERS or not where:
        raise ConfigError(f"benchmark {spec!r}: expected KIND:WHERE with KIND one of {', '.join(READERS)}")
    path, _, named = where.partition(",")
    reader, evaluated, shots_from = READERS[kind]
    if support and not shots_from:
        raise ConfigError(f"{spec}: has no split for shots; name another file that they come from")
    split = shots_from if support else named or evaluated
    benchmark = reader(Path(path), split)
    if classes is not None:
        if kind != "json" or benchmark.kind != CLASSIFICATION:
            raise ConfigError(f"{spec}: classes are for labels in JSON lines; a {kind} benchmark has its own")
        benchmark = replace(benchmark, classes=tuple(classes))
    benchmark = replace(benchmark, name=f"{kind}:{path},{split}" if split else spec)
    _check(benchmark)
    return benchmark


def _check(benchmark: Benchmark) -> None:
    if not benchmark.records:
        raise DataError(f"{benchmark.name}: holds no record of that split")
    (key, count), *_ = Counter(record.key for record in benchmark.records).most_common(1)
    if count > 1:
        raise DataError(f"{benchmark.name}: {key} stands there {count} times; expected once")
    known, pictures = set(benchmark.classes), set[Path]()
    for record in benchmark.records:
        if not record.targets or not all(text.strip() for text in record.targets):
            what = {CAPTIONING: "captions", VQA: "answers", CLASSIFICATION: "a label"}[benchmark.kind]
            raise DataError(f"{benchmark.name}: {record.key}: {list(record.targets)}; expected {what}, none empty")
        if benchmark.kind == CLASSIFICATION and record.targets[0] not in known:
            few = ", ".join(benchmark.classes[:5])
            raise DataError(f"{benchmark.name}: {record.key}: label {record.targets[0]!r} is none of the classes {few}")
        if benchmark.kind == VQA and not record.question.strip():
            raise DataError(f"{benchmark.name}: {record.key}: the question is empty")
        pictures.add(record.image)
    listed: dict[Path, set[str]] = {}
    for picture in pictures:  # one look at each folder: there can be a hundred thousand of them
        folder = picture.parent
        if folder not in listed:
            listed[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    missing = next((r for r in benchmark.records if r.image.name not in listed[r.image.parent]), None)
    if missing:
        raise DataError(f"{benchmark.name}: {missing.key}: no picture {missing.image}")
    if benchmark.kind == CLASSIFICATION and len(benchmark.classes) < 2:
        raise DataError(f"{benchmark.name}: classes {list(benchmark.classes)}; expected at least two")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({str(error).splitlines()[0]})") from None


def _field(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of a record. Raises DataError, naming where it is, for a missing one or one of another kind."""
    if not isinstance(record, dict) or key not in record:
        there = f"keys {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: {there}; expected {key!r}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key} {str(value)[:40]!r}; expected {_named(kind)}")
    return value


def _named(kind: type | tuple[type, ...]) -> str:
    names = {str: "a text", int: "a number", list: "a list", dict: "an object"}
    return " or ".join(names[k] for k in (kind if isinstance(kind, tuple) else (kind,)))


def _items(record: Any, key: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, item) of a list of objects."""
    items = _field(record, key, list, where)
    return [(f"{where}: {key} {i}", item) for i, item in enumerate(items)]


def _texts(record: Any, key: str, inner: str, where: str) -> tuple[str, ...]:
    """Texts in a list, or in the field `inner` of each of its objects."""
    values = _field(record, key, list, where)
    return tuple(
        value if isinstance(value, str) else _field(value, inner, str, f"{where}: {key} {i}")
        for i, value in enumerate(values)
    )


def _first(*paths: Path) -> Path:
    """The first that exists, or the first of all, which is then missed by its name."""
    return next((path for path in paths if path.exists()), paths[0])


def read_coco(root: Path, split: str) -> Benchmark:
    """COCO's captions. Pictures in `DIR/val2014/` and so on.

    `dataset_coco.json` (Karpathy's splits `train`, `restval`, `val`, `test`; train has restval with it, as usual),
    or `annotations/captions_SPLIT.json` for COCO's own, such as `val2017`.
    """
    if split in ("train", "restval", "val", "test"):
        splits = ("train", "restval") if split == "train" else (split,)
        return _karpathy(_first(root / "dataset_coco.json", root / "annotations" / "dataset_coco.json"), splits, root)
    path = root / "annotations" / f"captions_{split}.json"
    content = _load(path)
    captions: dict[int, list[str]] = {}
    files = {}
    for where, image in _items(content, "images", str(path)):
        files[_field(image, "id", int, where)] = _field(image, "file_name", str, where)
    for where, annotation in _items(content, "annotations", str(path)):
        number = _field(annotation, "image_id", int, where)
        if number not in files:
            raise DataError(f"{where}: image_id {number} is none of the {len(files)} images")
        captions.setdefault(number, []).append(_field(annotation, "caption", str, where).strip())
    return Benchmark(
        "",
        CAPTIONING,
        [Record(str(n), root / split / file, tuple(captions.get(n, ()))) for n, file in files.items()],
    )


def read_flickr30k(root: Path, split: str) -> Benchmark:
    """Flickr30k. `dataset_flickr30k.json` (Karpathy's `train`, `val`, `test`), or, for the split `all`,
    `results_20130124.token` (`NAME.jpg#0<TAB>caption`). Pictures in `DIR/flickr30k-images/`.
    """
    images = _first(root / "flickr30k-images", root / "flickr30k_images", root / "images")
    if split != "all":
        return _karpathy(root / "dataset_flickr30k.json", (split,), images, folders=False)
    path = root / "results_20130124.token"
    captions: dict[str, list[str]] = {}
    for number, line in numbered_lines(path):
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise DataError(f"{path}: line {number}: {line[:40]!r}; expected NAME.jpg#0, a tab and a caption")
        captions.setdefault(name.rpartition("#")[0], []).append(caption.strip())
    return Benchmark("", CAPTIONING, [Record(name, images / name, tuple(some)) for name, some in captions.items()])


def _karpathy(path: Path, splits: Sequence[str], images: Path, *, folders: bool = True) -> Benchmark:
    records = []
    for where, image in _items(_load(path), "images", str(path)):
        if _field(image, "split", str, where) not in splits:
            continue
        name = _field(image, "filename", str, where)
        folder = images / _field(image, "filepath", str, where) if folders else images
        texts = tuple(text.strip() for text in _texts(image, "sentences", "raw", where))
        records.append(Record(name, folder / name, texts))
    return Benchmark("", CAPTIONING, records)


def read_vqav2(root: Path, split: str) -> Benchmark:
    """VQAv2: `v2_OpenEnded_mscoco_SPLIT_questions.json`, `v2_mscoco_SPLIT_annotations.json`, and COCO's pictures."""
    return _vqa(root, split, "v2_")


def read_okvqa(root: Path, split: str) -> Benchmark:
    """OK-VQA: `OpenEnded_mscoco_SPLIT_questions.json`, `mscoco_SPLIT_annotations.json`, and COCO's pictures."""
    return _vqa(root, split, "")


def _vqa(root: Path, split: str, prefix: str) -> Benchmark:
    asked, answered = root / f"{prefix}OpenEnded_mscoco_{split}_questions.json", root / f"{prefix}mscoco_{split}_annot"
    answered = answered.with_name(answered.name + "ations.json")
    annotations = {}
    for where, annotation in _items(_load(answered), "annotations", str(answered)):
        annotations[_field(annotation, "question_id", int, where)] = (where, annotation)
    records = []
    for where, question in _items(_load(asked), "questions", str(asked)):
        number, image = _field(question, "question_id", int, where), _field(question, "image_id", int, where)
        if number not in annotations:
            raise DataError(f"{answered}: no answers to question {number}")
        there, annotation = annotations.pop(number)
        if _field(annotation, "image_id", int, there) != image:
            raise DataError(f"{there}: image_id {annotation['image_id']}; {asked.name} has {image} for it")
        records.append(
            Record(
                str(number),
                root / split / f"COCO_{split}_{image:012d}.jpg",
                _texts(annotation, "answers", "answer", there),
                _field(question, "question", str, where),
                str(annotation.get("answer_type", "")) if prefix else "",
            )
        )
    if annotations:
        raise DataError(f"{asked}: no question {next(iter(annotations))}, to which {answered.name} has answers")
    return Benchmark("", VQA, records)


def read_textvqa(root: Path, split: str) -> Benchmark:
    """TextVQA: `TextVQA_0.5.1_SPLIT.json`; pictures of train and val in `DIR/train_images/`, of test in
    `DIR/test_images/`.
    """
    path = root / f"TextVQA_0.5.1_{split}.json"
    images = root / ("test_images" if split == "test" else "train_images")
    records = []
    for where, item in _items(_load(path), "data", str(path)):
        name = _field(item, "image_id", str, where)
        records.append(
            Record(
                str(_field(item, "question_id", (int, str), where)),
                images / f"{name}.jpg",
                _texts(item, "answers", "answer", where),
                _field(item, "question", str, where),
            )
        )
    return Benchmark("", VQA, records)


def read_vizwiz(root: Path, split: str) -> Benchmark:
    """VizWiz: `SPLIT.json` or `Annotations/SPLIT.json`; pictures in `DIR/SPLIT/`. Its test split has no answers."""
    path = _first(root / f"{split}.json", root / "Annotations" / f"{split}.json")
    content = {"records": _load(path)}
    records = []
    for where, item in _items(content, "records", str(path)):
        name = _field(item, "image", str, where)
        answers = _texts(item, "answers", "answer", where)
        question = _field(item, "question", str, where)
        records.append(Record(name, root / split / name, answers, question, str(item.get("answer_type", ""))))
    return Benchmark("", VQA, records)


HATEFUL_PROMPT = 'is an image with: "{}" written on it. Is it hateful? Answer:'


def read_hateful_memes(root: Path, split: str) -> Benchmark:
    """Hateful Memes: `SPLIT.jsonl` with `id`, `img`, `label` and `text`. The positive class is "yes"."""
    path = root / f"{split}.jsonl"
    records = []
    for where, item in _lines(path):
        label = _field(item, "label", int, where)
        if label not in (0, 1):
            raise DataError(f"{where}: label {label}; expected 0 or 1")
        records.append(
            Record(
                str(_field(item, "id", (int, str), where)),
                root / _field(item, "img", str, where),
                ("yes" if label else "no",),
                _field(item, "text", str, where),
            )
        )
    return Benchmark("", CLASSIFICATION, records, ("no", "yes"), HATEFUL_PROMPT)


def read_imagenet(root: Path, split: str) -> Benchmark:
    """ImageNet: `DIR/SPLIT/n01440764/*.JPEG`, or the validation tar's loose `ILSVRC2012_val_00000001.JPEG` with the
    devkit beside them: `DIR/ILSVRC2012_devkit_t12/data/` with its `meta.mat` and ground truth.

    The names are CLIP's for all 1,000 classes; of fewer, those in `DIR/LOC_synset_mapping.txt`.
    """
    folder = root / split
    wnids = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if wnids:
        labelled = [(p, wnid) for wnid in wnids for p in sorted((folder / wnid).iterdir())]
    else:
        pictures = sorted(folder.glob("ILSVRC2012_val_*")) or sorted(root.glob("ILSVRC2012_val_*"))
        if not pictures:
            raise DataError(f"{folder}: expected folders such as n01440764, or ILSVRC2012_val_00000001.JPEG and so on")
        truth, wnids = _devkit(root / "ILSVRC2012_devkit_t12" / "data")
        if len(truth) != len(pictures):
            raise DataError(f"{root}: {len(pictures)} pictures; the devkit's ground truth has {len(truth)} labels")
        labelled = list(zip(pictures, truth, strict=True))
    names = _imagenet_names(root, wnids)
    return Benchmark(
        "",
        CLASSIFICATION,
        [Record(p.name, p, (names[wnid],)) for p, wnid in labelled if p.suffix.lower() in IMAGE_SUFFIXES],
        tuple(names[wnid] for wnid in wnids),
    )


def _imagenet_names(root: Path, wnids: Sequence[str]) -> dict[str, str]:
    path = root / "LOC_synset_mapping.txt"
    if len(wnids) == len(imagenet_classes()):
        return dict(zip(wnids, imagenet_classes(), strict=True))
    if not path.exists():
        raise DataError(f"{root}: {len(wnids)} classes; expected 1000, or their names in {path.name}")
    names = {wnid: text.split(",")[0].strip() for wnid, _, text in (line.partition(" ") for line in read_lines(path))}
    if unnamed := [wnid for wnid in wnids if not names.get(wnid)]:
        raise DataError(f"{path}: no name for {unnamed[0]}")
    return names


def _devkit(data: Path) -> tuple[list[str], list[str]]:
    """(the wnid of each validation picture in order, the 1,000 wnids sorted)."""
    from scipy.io import loadmat  # JAX needs scipy

    path = data / "meta.mat"
    try:
        synsets = loadmat(str(path), squeeze_me=True)["synsets"]
        wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the devkit's meta.mat ({str(error).splitlines()[0]})") from None
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    found = []
    for number, line in numbered_lines(truth):
        if not line.strip().isdecimal() or int(line) not in wnid:
            raise DataError(f"{truth}: line {number}: {line!r}; expected the number of a class")
        found.append(wnid[int(line)])
    return found, sorted(wnid.values())


def read_json_lines(path: Path, split: str) -> Benchmark:
    """One's own: an object a line, all of one kind; pictures are relative to the file.

    `{"image", "captions": […]}`, `{"image", "question", "answers": […]}` or `{"image", "label"}`, to which `question`
    may be added. The classes are the labels there are, sorted.
    """
    if split:
        raise ConfigError(f"json:{path},{split}: JSON lines have no splits; name another file")
    fields = {"captions": CAPTIONING, "answers": VQA, "label": CLASSIFICATION}
    found, kinds = [], list[str]()
    for where, item in _lines(path):
        field = next((field for field in fields if isinstance(item, dict) and field in item), "")
        if not field:
            raise DataError(f"{where}: expected one of {', '.join(fields)}")
        kinds.append(fields[field])
        if kinds[-1] != kinds[0]:
            raise DataError(f"{where}: a record of {kinds[-1]}; the first line's is of {kinds[0]}")
        label = field == "label"
        targets = (str(_field(item, field, (str, int), where)),) if label else _texts(item, field, field[:-1], where)
        question = _field(item, "question", str, where) if kinds[-1] == VQA or "question" in item else ""
        image = path.parent / _field(item, "image", str, where)
        found.append(Record(where.removeprefix(f"{path}: "), image, targets, question))
    kind = kinds[0]
    classes = tuple(sorted({r.targets[0] for r in found})) if kind == CLASSIFICATION else ()
    return Benchmark("", kind, found, classes)


def _lines(path: Path) -> Iterable[tuple[str, Any]]:
    """(where it stands, object) of JSON lines."""
    for number, line in numbered_lines(path):
        try:
            yield f"{path}: line {number}", json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}: line {number}: not JSON: {line[:40]!r}") from None


# kind → (reader, the split that is evaluated, the one that shots come from), where no split is named
READERS: Mapping[str, tuple[Callable[[Path, str], Benchmark], str, str]] = {
    "coco": (read_coco, "test", "train"),
    "flickr30k": (read_flickr30k, "test", "train"),
    "vqav2": (read_vqav2, "val2014", "train2014"),
    "okvqa": (read_okvqa, "val2014", "train2014"),
    "textvqa": (read_textvqa, "val", "train"),
    "vizwiz": (read_vizwiz, "val", "train"),
    "hateful_memes": (read_hateful_memes, "dev_seen", "train"),
    "imagenet": (read_imagenet, "val", "train"),
    "json": (read_json_lines, "", ""),
}
