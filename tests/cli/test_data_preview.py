"""``prism-fast data preview``: a page with samples as training reads them."""

from __future__ import annotations

import json
import re

from PIL import Image

RESPONSE = "<caption>\na cat\n</caption>\n<think>\nI look\n</think>\n<answer>\ncat\n</answer>"


def demonstrations(folder, count=20):
    turn = {"role": "user", "content": "<image>What <i>is</i> it?"}
    for n in range(count):
        Image.new("RGB", (40, 30), (n, 0, 0)).save(folder / f"{n}.png")
    records = [
        {
            "id": f"<b>{n}</b>",
            "messages": [turn, {"role": "assistant", "content": text}],
            "images": [f"{n}.png"],
        }
        for n, text in enumerate([RESPONSE] * (count - 1) + ["a cat"])
    ]  # fmt: skip
    path = folder / "demos.json"
    path.write_text(json.dumps(records))
    return path


def test_the_page_shows_turns_images_and_spans(invoke, policy_folder, tmp_path, monkeypatch):
    path = demonstrations(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, shown = invoke("data", "preview", path, "--samples", 3, "--policy", policy_folder)
    assert code == 0 and "demos-preview.html (3 of 20 samples)" in shown
    page = (tmp_path / "demos-preview.html").read_text()
    assert re.findall(r"<h3>(.*)</h3>", page) == [
        f"row {n} · &lt;b&gt;{n}&lt;/b&gt;" for n in (0, 9, 19)
    ]  # text is escaped
    assert page.count("data:image/png;base64,") == 3 and page.count("40 x 30 pixels") == 3
    assert page.count('<mark class="think">&lt;think&gt;\nI look') == 2
    assert page.count("no caption, think and answer sections in this order") == 1
    assert "What &lt;i&gt;is&lt;/i&gt; it?" in page and page.count(" tokens</span>") == 3
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_every_form_has_a_page(invoke, data_files, tmp_path):
    for name in ("sft", "align", "rlvr"):
        code, _ = invoke("data", "preview", data_files[name], "--out", tmp_path / f"{name}.html")
        assert code == 0
    align = (tmp_path / "align.html").read_text()
    assert "teacher caption" in align and "ground_truth" in align


def test_a_damaged_image_is_said_in_place_of_the_sample(invoke, tmp_path):
    path = demonstrations(tmp_path, count=2)
    (tmp_path / "0.png").write_bytes(b"nothing")
    assert invoke("data", "preview", path, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("not an image that can be read") == 1 and page.count("data:image/png;base64,") == 1


def test_refusals(command, tmp_path):
    path = demonstrations(tmp_path, count=2)
    for arguments, words in [
        (["data", "preview", tmp_path / "gone.json"], "does not exist"),
        (["data", "preview", path, "--samples", "0"], "--samples"),
        (["data", "preview", path, "--format", "other"], "other"),
    ]:
        code, message = command(*arguments)
        assert code != 0 and words in message and "Traceback" not in message
    assert not list(tmp_path.glob("*.html"))
