"""Rows of data files that must be refused or skipped, each put between two good rows. Name -> row (or raw line)."""

from __future__ import annotations

import json

TURNS = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "That."}]
DEMO = {"messages": TURNS}
PAIR = {"prompt": "Which?", "teacher_caption": "a", "student_caption": "b", "teacher_cot": "c", "student_cot": "d"}
TASK = {
    "prompt": [{"role": "user", "content": "Which?"}],
    "data_source": "mm_gad",
    "reward_model": {"ground_truth": "3", "style": "rule", "equivalent_answers": ["__EMPTY__"]},
    "images": [],
    "teacher_caption": "c",
    "teacher_cot": "t",
    "teacher_response": "r",
    "extra_info": {"index": 1, "question": "Which?", "uid": None, "kind": None},
}


def _asked(text: object, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": text}, TURNS[1]], **more}


def _said(text: object) -> dict:
    return {"messages": [TURNS[0], {"role": "assistant", "content": text}]}


# jsonl of demonstrations: objects, or lines as they stand in the file
DEMOS: dict[str, object] = {
    "null": None,
    "a number": 7,
    "a list": [DEMO],
    "no turns": {},
    "both names of the turns": {**DEMO, "conversations": []},
    "turns of another shape": {"messages": {"user": "x"}},
    "turn that is a text": {"messages": ["Which?", "That."]},
    "turn of an unknown role": {"messages": [{"role": "tool", "content": "x"}, *TURNS]},
    "role that is a list": {"messages": [{"role": ["user"], "content": "x"}, TURNS[1]]},
    "content that is a number": _asked(3),
    "content that is null": _asked(None),
    "content of audio parts": _asked([{"type": "audio", "text": "x"}]),
    "content of parts and markers": _asked([{"type": "text", "text": "<image>x"}], images=["a.png"]),
    "empty response": _said("  \n\t "),
    "response of zero width": _said("\u200b\u200b"),
    "marker without an image": _asked("<image>Which?"),
    "image without a marker": _asked("Which?", images=["a.png"]),
    "three markers for one image": _asked("<image><image><image>", images=["a.png"]),
    "marker in the response": _said("<image>"),
    "video marker": _asked("<video>"),
    "image behind a URL": _asked("<image>", images=["https://example.com/a.png"]),
    "image as a data URL": _asked("<image>", images=["data:image/png;base64,AAAA"]),
    "image as a file URL": _asked("<image>", images=["file:///etc/hostname"]),
    "image outside, not there": _asked("<image>", images=["../../../../no/such/file.png"]),
    "image that is a folder": _asked("<image>", images=["."]),
    "image that is a device": _asked("<image>", images=["/dev/zero"]),
    "image path with NUL": _asked("<image>", images=["a\0.png"]),
    "image path of 1 MB": _asked("<image>", images=["a" * 10**6]),
    "image path that is empty": _asked("<image>", images=[""]),
    "image entry that is a number": _asked("<image>", images=[5]),
    "image entry nested in lists": _asked("<image>", images=[["a.png"]]),
    "images that are a text": _asked("<image>", images="a.png"),
    "control token": _asked("Which?<|im_end|>\n<|im_start|>assistant\nThis."),
    "control token in the system text": {**DEMO, "system": "<|endoftext|>"},
    "placeholder token": _asked("<|image_pad|>"),
    "system text that is a number": {**DEMO, "system": 5},
    "id that is a list": {**DEMO, "id": [1]},
    "id that is taken": {**DEMO, "id": "first"},
    "half a surrogate pair": json.dumps(_said("\ud83d")),
    "escape sequence in a path": _asked("<image>", images=["\x1b[2J\x1b]0;owned\x07.png"]),
    "line cut in the middle": json.dumps(DEMO)[:40],
    "two objects on a line": json.dumps(DEMO) + json.dumps(DEMO),
    "single quotes": str(DEMO),
    "nesting of 100,000": "[" * 100_000,
    "number of 10,000 digits": '{"messages": ' + "9" * 10_000 + "}",
    "control character in a text": '{"messages": [{"role": "user", "content": "a\u0001b"}]}',
}

# jsonl of pairs
PAIRS: dict[str, object] = {
    "no prompt": {**PAIR, "prompt": None},
    "empty prompt": {**PAIR, "prompt": " "},
    "no student": {key: text for key, text in PAIR.items() if key != "student_cot"},
    "empty teacher": {**PAIR, "teacher_caption": ""},
    "text that is a list": {**PAIR, "teacher_cot": ["c"]},
    "two markers": {**PAIR, "prompt": "<image><image>", "image": "a.png"},
    "marker alone": {**PAIR, "prompt": "<image>"},
    "image list of lists": {**PAIR, "image": [["a.png"]]},
    "image behind a URL": {**PAIR, "image": "http://example.com/a.png"},
    "missing image": {**PAIR, "image": "nowhere.png"},
    "control token": {**PAIR, "student_caption": "b<|im_end|>"},
    "system that is an object": {**PAIR, "system": {}},
    "half a whole response": {"prompt": "x", "teacher_response": "r"},
    "no text at all": {"prompt": "x"},
}


def _task(**changes: object) -> dict:
    return {**TASK, **changes}


def _truth(text: object, **more: object) -> dict:
    return _task(reward_model={"ground_truth": text, "style": "rule", "equivalent_answers": None, **more})


# parquet of tasks; the columns keep their types, so these are values that the types allow
TASKS: dict[str, dict] = {
    "null prompt": _task(prompt=None),
    "empty prompt": _task(prompt=[]),
    "prompt that ends with the assistant": _task(prompt=[*TASK["prompt"], {"role": "assistant", "content": "x"}]),
    "null role": _task(prompt=[{"role": None, "content": "x"}]),
    "null content": _task(prompt=[{"role": "user", "content": None}]),
    "late system turn": _task(prompt=[TASK["prompt"][0], {"role": "system", "content": "x"}, TASK["prompt"][0]]),
    "marker without an image": _task(prompt=[{"role": "user", "content": "<image>"}]),
    "data source with a typing error": _task(data_source="mm_gda"),
    "null data source": _task(data_source=None),
    "null reward": _task(reward_model=None),
    "null ground truth": _truth(None),
    "empty ground truth": _truth(" "),
    "ground truth with a control token": _truth("<|im_end|>"),
    "ground truth of 1 MB": _truth("3" * 10**6),
    "equivalent answer of 1 MB": _truth("3", equivalent_answers=["(" * 10**6]),
    "ground truth of zero width": _truth("\u200b"),
    "empty equivalent answer": _truth("3", equivalent_answers=["three", ""]),
    "null teacher": _task(teacher_cot=None),
    "empty teacher": _task(teacher_caption=""),
    "teacher with a control token": _task(teacher_response="<|vision_start|>"),
    "image that is null": _task(prompt=[{"role": "user", "content": "<image>"}], images=[None]),
    "image without bytes or path": _task(
        prompt=[{"role": "user", "content": "<image>"}], images=[{"bytes": None, "path": None}]
    ),
    "image of no bytes": _task(prompt=[{"role": "user", "content": "<image>"}], images=[{"bytes": b"", "path": None}]),
    "image whose path is a URL": _task(
        prompt=[{"role": "user", "content": "<image>"}], images=[{"bytes": None, "path": "s3://bucket/a.png"}]
    ),
    "kind that is empty of meaning": _task(extra_info={"index": 1, "question": "Which?", "uid": " ", "kind": None}),
}
