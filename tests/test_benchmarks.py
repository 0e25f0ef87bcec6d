"""Readers of published benchmarks, on small files in the official layouts, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from clip_jax.errors import ConfigError, DataError, UserError
from clip_jax.evaluation.prompts import imagenet_classes
from flamingo_jax.cli import read_shots
from flamingo_jax.evaluation.benchmarks import open_benchmark


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), colour).save(path)
    return path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, items: list[Any]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def coco(root: Path) -> None:
    """COCO's own annotations of two pictures, and Karpathy's splits of three."""
    write(
        root / "annotations" / "captions_val2017.json",
        {
            "info": {"description": "COCO 2017 Dataset", "year": 2017},
            "licenses": [{"id": 1, "name": "CC BY"}],
            "images": [
                {"license": 4, "file_name": "000000397133.jpg", "height": 427, "width": 640, "id": 397133},
                {"license": 1, "file_name": "000000037777.jpg", "height": 230, "width": 352, "id": 37777},
            ],
            "annotations": [
                {"image_id": 37777, "id": 98753, "caption": "A dining table with bananas.\n"},
                {"image_id": 397133, "id": 370509, "caption": "A man cooks."},
                {"image_id": 397133, "id": 375891, "caption": "A man is in a kitchen."},
            ],
        },
    )
    for name in ("000000397133", "000000037777"):
        picture(root / "val2017" / f"{name}.jpg")
    images = []
    for number, split in enumerate(("test", "train", "restval")):
        name = f"COCO_val2014_{number:012d}.jpg"
        picture(root / "val2014" / name)
        images.append(
            {
                "filepath": "val2014", "sentids": [number], "filename": name, "imgid": number, "split": split,
                "sentences": [{"tokens": ["a"], "raw": f"Picture {number}.", "imgid": number, "sentid": number}],
                "cocoid": number,
            }
        )  # fmt: skip
    write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})


def flickr30k(root: Path) -> None:
    for name in ("1000092795.jpg", "10002456.jpg"):
        picture(root / "flickr30k-images" / name)
    rows = ["1000092795.jpg#0\tTwo young guys .", "1000092795.jpg#1\tTwo men outside .", "10002456.jpg#0\tFour men ."]
    (root / "results_20130124.token").write_text("\n".join(rows) + "\n")
    sentences = [{"tokens": ["two"], "raw": "Two young guys.", "imgid": 0, "sentid": 0}]
    images = [
        {"sentids": [0], "imgid": 0, "sentences": sentences, "split": "test", "filename": "1000092795.jpg"},
        {"sentids": [0], "imgid": 1, "sentences": sentences, "split": "train", "filename": "10002456.jpg"},
    ]
    write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, 1)]


def vqa(root: Path, prefix: str = "v2_") -> None:
    head = {"info": {}, "data_type": "mscoco", "license": {}, "data_subtype": "val2014"}
    asked = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "Is it day?", "question_id": 262148001},
    ]
    given = [
        {"question_type": "is it", "multiple_choice_answer": "yes", "answers": answers("yes", "yes", "no"),
         "image_id": 262148, "answer_type": "yes/no", "question_id": 262148001},
        {"question_type": "where", "multiple_choice_answer": "down", "answers": answers("down", "at table", "down"),
         "image_id": 262148, "answer_type": "other", "question_id": 262148000},
    ]  # fmt: skip
    write(root / f"{prefix}OpenEnded_mscoco_val2014_questions.json", head | {"questions": asked})
    write(root / f"{prefix}mscoco_val2014_annotations.json", head | {"annotations": given})
    picture(root / "val2014" / "COCO_val2014_000000262148.jpg")


def textvqa(root: Path) -> None:
    item = {
        "question": "what is the brand of this camera?", "image_id": "003a8ae2ef43b901", "image_classes": ["Cassette"],
        "flickr_original_url": "", "flickr_300k_url": "", "image_width": 24, "image_height": 20,
        "answers": ["nous les gosses", "dakota"], "question_tokens": ["what"], "question_id": 34602, "set_name": "val",
    }  # fmt: skip
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [item]}
    write(root / "TextVQA_0.5.1_val.json", content)
    picture(root / "train_images" / "003a8ae2ef43b901.jpg")


def vizwiz(root: Path) -> None:
    item = {
        "image": "VizWiz_val_00000000.jpg", "question": "Ok. There is another picture I hope it is a better one.",
        "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}, {"answer_confidence": "no", "answer": "a"}],
        "answer_type": "unanswerable", "answerable": 0,
    }  # fmt: skip
    write(root / "Annotations" / "val.json", [item])
    picture(root / "val" / "VizWiz_val_00000000.jpg")


def hateful_memes(root: Path) -> None:
    root.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = [{"id": i, "img": f"img/0{i}.png", "label": i % 2, "text": f"text {{{i}}}"}
                                    for i in (8290, 8291)]  # fmt: skip
    write_lines(root / "dev_seen.jsonl", lines)
    for line in lines:
        picture(root / line["img"])


def own(root: Path) -> None:
    root.mkdir(exist_ok=True)
    picture(root / "pictures" / "a.png")
    write_lines(root / "c.jsonl", [{"image": "pictures/a.png", "captions": ["a red thing", "red"]}])
    write_lines(root / "q.jsonl", [{"image": "pictures/a.png", "question": "which colour?", "answers": ["red"]}])
    labels = [{"image": "pictures/a.png", "label": "red"}, {"image": "pictures/a.png", "label": 7, "question": "what?"}]
    write_lines(root / "l.jsonl", labels)


def test_a_line_of_json_ends_at_a_newline_only(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    caption = "a\u2028red\u0085thing"  # as json.dumps(…, ensure_ascii=False) leaves them
    (tmp_path / "c.jsonl").write_text(f'{{"image": "a.png", "captions": ["{caption}"]}}\n', encoding="utf-8")
    assert open_benchmark(f"json:{tmp_path}/c.jsonl").records[0].targets == (caption,)


FOUND = [
    (coco, "coco", ",val2017", "captioning", [
        ("397133", "val2017/000000397133.jpg", ("A man cooks.", "A man is in a kitchen."), "", ""),
        ("37777", "val2017/000000037777.jpg", ("A dining table with bananas.",), "", ""),
    ]),
    (coco, "coco", "", "captioning", [
        ("COCO_val2014_000000000000.jpg", "val2014/COCO_val2014_000000000000.jpg", ("Picture 0.",), "", ""),
    ]),
    (coco, "coco", ",train", "captioning", [
        (f"COCO_val2014_{n:012d}.jpg", f"val2014/COCO_val2014_{n:012d}.jpg", (f"Picture {n}.",), "", "") for n in (1, 2)
    ]),
    (flickr30k, "flickr30k", "", "captioning", [
        ("1000092795.jpg", "flickr30k-images/1000092795.jpg", ("Two young guys.",), "", ""),
    ]),
    (flickr30k, "flickr30k", ",all", "captioning", [
        ("1000092795.jpg", "flickr30k-images/1000092795.jpg", ("Two young guys .", "Two men outside ."), "", ""),
        ("10002456.jpg", "flickr30k-images/10002456.jpg", ("Four men .",), "", ""),
    ]),
    (vqa, "vqav2", "", "vqa", [
        ("262148000", "val2014/COCO_val2014_000000262148.jpg", ("down", "at table", "down"), "Where is he looking?",
         "other"),
        ("262148001", "val2014/COCO_val2014_000000262148.jpg", ("yes", "yes", "no"), "Is it day?", "yes/no"),
    ]),
    (lambda root: vqa(root, ""), "okvqa", "", "vqa", [
        ("262148000", "val2014/COCO_val2014_000000262148.jpg", ("down", "at table", "down"), "Where is he looking?",
         ""),
        ("262148001", "val2014/COCO_val2014_000000262148.jpg", ("yes", "yes", "no"), "Is it day?", ""),
    ]),
    (textvqa, "textvqa", "", "vqa", [
        ("34602", "train_images/003a8ae2ef43b901.jpg", ("nous les gosses", "dakota"),
         "what is the brand of this camera?", ""),
    ]),
    (vizwiz, "vizwiz", "", "vqa", [
        ("VizWiz_val_00000000.jpg", "val/VizWiz_val_00000000.jpg", ("unanswerable", "a"),
         "Ok. There is another picture I hope it is a better one.", "unanswerable"),
    ]),
    (hateful_memes, "hateful_memes", "", "classification", [
        ("8290", "img/08290.png", ("no",), "text {8290}", ""),
        ("8291", "img/08291.png", ("yes",), "text {8291}", ""),
    ]),
    (own, "json", "/c.jsonl", "captioning", [("line 1", "pictures/a.png", ("a red thing", "red"), "", "")]),
    (own, "json", "/q.jsonl", "vqa", [("line 1", "pictures/a.png", ("red",), "which colour?", "")]),
    (own, "json", "/l.jsonl", "classification", [
        ("line 1", "pictures/a.png", ("red",), "", ""), ("line 2", "pictures/a.png", ("7",), "what?", ""),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "split", "kind", "expected"), FOUND)
def test_records_of_published_files(
    make: Callable[[Path], None], name: str, split: str, kind: str, expected: list[Any], tmp_path: Path
) -> None:
    make(tmp_path)
    benchmark = open_benchmark(f"{name}:{tmp_path}{split}")
    assert benchmark.kind == kind
    found = [(r.key, str(r.image.relative_to(tmp_path)), r.targets, r.question, r.group) for r in benchmark.records]
    assert found == expected
    assert all(record.image.is_file() for record in benchmark.records)


def test_classes_and_the_split_of_the_shots(tmp_path: Path) -> None:
    hateful_memes(tmp_path / "memes")
    assert open_benchmark(f"hateful_memes:{tmp_path}/memes").classes == ("no", "yes")
    own(tmp_path)
    assert open_benchmark(f"json:{tmp_path}/l.jsonl").classes == ("7", "red")
    spec = f"json:{tmp_path}/l.jsonl"
    assert open_benchmark(spec, classes=["red", "7", "blue"]).classes == ("red", "7", "blue")
    with pytest.raises(DataError, match="line 2: label '7' is none of the classes red, blue"):
        open_benchmark(spec, classes=["red", "blue"])
    coco(tmp_path / "coco")
    shots = open_benchmark(f"coco:{tmp_path}/coco,test", support=True)
    assert shots.name.endswith("coco,train") and len(shots.records) == 2
    with pytest.raises(ConfigError, match="no split for shots"):
        open_benchmark(spec, support=True)


def test_imagenet_in_both_layouts(tmp_path: Path) -> None:
    """Folders of a few classes with names of their own, and the loose files with the devkit's numbers."""
    for wnid in ("n01440764", "n02123045"):
        picture(tmp_path / "few" / "val" / wnid / f"ILSVRC2012_val_{wnid[-4:]}.JPEG")
    with pytest.raises(DataError, match="2 classes; expected 1000, or their names in LOC_synset_mapping.txt"):
        open_benchmark(f"imagenet:{tmp_path}/few")
    mapping = tmp_path / "few" / "LOC_synset_mapping.txt"
    mapping.write_text("n01440764 tench, Tinca tinca\nn02123045 tabby, tabby cat\n")
    few = open_benchmark(f"imagenet:{tmp_path}/few")
    assert few.classes == ("tench", "tabby") and [r.targets for r in few.records] == [("tench",), ("tabby",)]

    wnids = [f"n{number:08d}" for number in range(1000)]
    order = [(7 * i) % 1000 for i in range(1000)]  # the devkit's numbers are in another order than the wnids
    data = tmp_path / "all" / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(i + 1, wnids[order[i]], "words", "gloss", 0) for i in range(1000)] + [(1001, "n9", "animal", "", 3)]
    savemat(str(data / "meta.mat"), {"synsets": np.array(rows, dtype=kinds)[:, None]})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n")
    for number in (1, 2):
        picture(tmp_path / "all" / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    every = open_benchmark(f"imagenet:{tmp_path}/all")
    names = imagenet_classes()
    assert [r.targets for r in every.records] == [(names[14],), (names[0],)] and list(every.classes) == names
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n1\n")
    with pytest.raises(DataError, match="2 pictures; the devkit's ground truth has 3 labels"):
        open_benchmark(f"imagenet:{tmp_path}/all")


def edit(path: Path, change: Callable[[Any], Any]) -> Path:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))
    return path


def no_answers(content: Any) -> None:
    content["annotations"][0]["answers"] = []


BAD = [
    (vqa, "vqav2", "", "v2_mscoco_val2014_annotations.json", no_answers, r"262148001: \[\]; expected answers"),
    (vqa, "vqav2", "", "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"].pop() and None,
     "annotations.json: no answers to question 262148000"),
    (vqa, "vqav2", "", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"].pop() and None,
     "questions.json: no question 262148001, to which v2_mscoco_val2014_annotations.json has answers"),
    (vqa, "vqav2", "", "v2_OpenEnded_mscoco_val2014_questions.json",
     lambda c: c["questions"][0].pop("question") and None, "questions 0: keys image_id, question_id; expected 'quest"),
    (vqa, "vqav2", "", "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][1].update(image_id=9),
     "annotations 1: image_id 9; v2_OpenEnded_mscoco_val2014_questions.json has 262148"),
    (vqa, "vqav2", "", "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: [c], "list; expected 'questions'"),
    (textvqa, "textvqa", "", "TextVQA_0.5.1_val.json", lambda c: c["data"][0].pop("answers") and None,
     "TextVQA_0.5.1_val.json: data 0: keys .*; expected 'answers'"),
    (textvqa, "textvqa", "", "TextVQA_0.5.1_val.json", lambda c: c["data"].append(c["data"][0]),
     "34602 stands there 2 times"),
    (textvqa, "textvqa", "", "TextVQA_0.5.1_val.json", lambda c: c["data"][0].update(image_id="gone"),
     "34602: no picture .*train_images/gone.jpg"),
    (textvqa, "textvqa", "", "TextVQA_0.5.1_val.json", lambda c: c["data"][0].update(question=" "),
     "34602: the question is empty"),
    (textvqa, "textvqa", "", "TextVQA_0.5.1_val.json", lambda c: c.update(data=[]), "holds no record of that split"),
    (vizwiz, "vizwiz", "", "Annotations/val.json", lambda c: c[0]["answers"].append({"answer_confidence": "no"}) or c,
     "records 0: answers 2: keys answer_confidence; expected 'answer'"),
    (vizwiz, "vizwiz", "", "Annotations/val.json", lambda c: c[0]["answers"].append(3) or c,
     "records 0: answers 2: int; expected 'answer'"),
    (coco, "coco", ",val2017", "annotations/captions_val2017.json", lambda c: c["annotations"][0].update(image_id=5),
     "annotations 0: image_id 5 is none of the 2 images"),
    (coco, "coco", ",val2017", "annotations/captions_val2017.json", lambda c: c["annotations"].pop(0) and None,
     r"37777: \[\]; expected captions"),
    (hateful_memes, "hateful_memes", "", "dev_seen.jsonl", None, "line 2: not JSON: 'junk'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "split", "file", "change", "line"), BAD)
def test_what_is_missing_is_named(
    make: Callable[[Path], None], name: str, split: str, file: str, change: Any, line: str, tmp_path: Path
) -> None:
    make(tmp_path)
    path = tmp_path / file
    if change:
        edit(path, change)
    else:
        path.write_text(path.read_text().splitlines()[0] + "\njunk\n")
    with pytest.raises(DataError, match=line) as caught:
        open_benchmark(f"{name}:{tmp_path}{split}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([{"image": "a.png"}], "line 1: expected one of captions, answers, label"),
        ([{"image": "a.png", "captions": ["x"]}, {"image": "a.png", "label": "x"}], "line 2: a record of classif"),
        ([{"image": "a.png", "captions": "x"}], "line 1: captions 'x'; expected a list"),
        ([{"image": "a.png", "answers": ["x"]}], "line 1: keys image, answers; expected 'question'"),
        ([{"image": "b.png", "label": "x"}, {"image": "a.png", "label": "y"}], "line 1: no picture .*b.png"),
        ([{"image": "a.png", "label": "x"}], r"classes \['x'\]; expected at least two"),
        ([{"image": "a.png", "label": True}], "line 1: label 'True'; expected a text or a number"),
        (["text"], "line 1: expected one of"),
    ],
)
def test_own_files_are_refused_by_line(lines: list[Any], line: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write_lines(tmp_path / "x.jsonl", lines)
    with pytest.raises(DataError, match=line):
        open_benchmark(f"json:{tmp_path}/x.jsonl")


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    """Blank ones count, too."""
    picture(tmp_path / "a.png")
    good = [json.dumps({"image": "a.png", "label": label}) for label in "xy"]
    (tmp_path / "x.jsonl").write_text("\n".join(["", good[0], " ", good[1], ""]))
    assert [record.key for record in open_benchmark(f"json:{tmp_path}/x.jsonl").records] == ["line 2", "line 4"]
    (tmp_path / "x.jsonl").write_text("\n".join([good[0], "", good[1], "junk"]))
    with pytest.raises(DataError, match="x.jsonl: line 4: not JSON"):
        open_benchmark(f"json:{tmp_path}/x.jsonl")
    shot = json.dumps({"image": "a.png", "text": "a"})
    (tmp_path / "shots.jsonl").write_text(f"\n{shot}\n\n{{}}\n")
    with pytest.raises(DataError, match="shots.jsonl: line 4: expected an object"):
        read_shots(tmp_path / "shots.jsonl", None)
    (tmp_path / "results_20130124.token").write_text("a.png#0\tx\n\njunk\n")
    with pytest.raises(DataError, match="token: line 3: 'junk'"):
        open_benchmark(f"flickr30k:{tmp_path},all")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("cocoa:x", "benchmark 'cocoa:x': expected KIND:WHERE with KIND one of coco, flickr30k"),
        ("coco:", "expected KIND:WHERE"),
        ("coco:nowhere", "nowhere/dataset_coco.json: can't be read"),
        ("flickr30k:nowhere,all", "nowhere/results_20130124.token: can't be read"),
        ("imagenet:nowhere", "nowhere/val: expected folders such as n01440764"),
        ("json:nowhere.jsonl,test", "JSON lines have no splits"),
    ],
)
def test_specs_are_refused_in_one_line(spec: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        open_benchmark(spec)
