from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from plotly.offline import get_plotlyjs

from prism_fast.report import html
from prism_fast.report.html import SILENT_AFTER, json_for_script, write_report
from prism_fast.report.rundir import read_run
from prism_fast.report.statistics import accuracy_interval, paired_difference
from prism_fast.report.summary import RESAMPLES, SEED
from tests.report.page import Element, figures, parse
from tests.report.synthetic import KINDS, append_lines, write_frames, write_run


def report(path: Path, now: float | None = None) -> Element:
    return parse(write_report(path, now=now).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def page(finished_run: Path) -> Element:
    return report(finished_run)


def test_the_file_stands_alone(page: Element, finished_run: Path) -> None:
    for element in page.all():
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"{element.tag} {name}"
            if name in ("src", "href", "action", "srcset", "data", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), f"{element.tag} {name}={value[:80]}"
    for style in page.all("style"):
        assert "@import" not in style.text and "url(" not in style.text and "http" not in style.text
    own = (finished_run / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert "http://" not in own and "https://" not in own
    assert (finished_run / "report.html").stat().st_size < 6_000_000
    assert not list(finished_run.glob("*.tmp"))


def test_the_policy_allows_exactly_the_two_scripts(page: Element) -> None:
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules
    scripts = [script.text for script in page.all("script") if "type" not in script.attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert len(scripts) == 2 and rules["script-src"].split() == [f"'sha256-{digest}'" for digest in hashes]


def test_same_run_same_bytes(finished_run: Path) -> None:
    first = write_report(finished_run).read_bytes()
    assert write_report(finished_run, now=1.0).read_bytes() == first


def test_header_and_state(page: Element) -> None:
    assert page.one("h1").text == "digits" and page.one(id="state").text == "complete"
    facts = {fact.one("dt").text: fact.one("dd").text for fact in page.one("dl", css="facts").all("div")}
    assert facts["seed"] == "1" and facts["semantics"] == "prism_fast" and facts["torch"] == "2.13.0"
    assert facts["wall time of finished stages"] == "2 min 24 s"


def test_table_and_charts_show_the_numbers_of_the_statistics(page: Element, finished_run: Path) -> None:
    run = read_run(finished_run)
    clusters = [item["cluster"] for item in run.evals["sft"]]
    correct = {stage: [item["correct"] for item in items] for stage, items in run.evals.items()}
    rows = {
        row.all("th")[0].text.strip(): row.all("td") for row in page.one("table", id="stages").one("tbody").all("tr")
    }
    assert list(rows) == ["SFT", "SFT continued", "RLVR from SFT", "Alignment", "RLVR"]
    for name, stage in (("SFT", "sft"), ("Alignment", "align"), ("RLVR", "rlvr")):
        interval = accuracy_interval(correct[stage], clusters)
        assert rows[name][0].one("strong").text == f"{100 * interval.mean:.1f}"
        assert rows[name][0].one("small").text == f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    gain = paired_difference(correct["rlvr"], correct["sft_continued"], clusters, seed=SEED, resamples=RESAMPLES)
    expected = f"{100 * gain.mean:+.1f} [{100 * gain.interval.low:+.1f}, {100 * gain.interval.high:+.1f}]"
    assert expected in rows["RLVR"][2].text and rows["RLVR"][2].attributes["class"] == "up"

    dots = {trace["name"]: trace for trace in figures(page)["accuracy"]["data"]}
    assert dots["SFT"]["x"] == ["all questions", *KINDS]
    for position, kind in enumerate(KINDS, start=1):
        items = [item for item in run.evals["sft"] if item["kind"] == kind]
        names = [item["cluster"] for item in items]
        own = accuracy_interval([item["correct"] for item in items], names)
        assert dots["SFT"]["y"][position] == pytest.approx(own.mean, rel=1e-5)
        assert dots["SFT"]["error_y"]["array"][position] == pytest.approx(own.high - own.mean, rel=1e-4)
        assert dots["SFT"]["error_y"]["arrayminus"][position] == pytest.approx(own.mean - own.low, rel=1e-4)

    bars = {trace["y"][0]: trace for trace in figures(page)["difference"]["data"]}
    bar = bars["RLVR − SFT continued"]
    assert bar["x"][0] == pytest.approx(100 * gain.mean, rel=1e-5)
    assert bar["error_x"]["array"][0] == pytest.approx(100 * (gain.interval.high - gain.mean), rel=1e-4)
    assert f"RLVR is above SFT continued at 95 % confidence: {expected}" in page.one("ul", css="verdicts").text


@pytest.mark.parametrize(
    ("evaluation", "verdict"), [("rlvr", "above"), ("sft", "below"), ("rlvr_direct", "cannot be told from")]
)
def test_the_first_sentence_compares_prism_with_rlvr_from_sft_at_its_cost(
    run_dir: Path, evaluation: str, verdict: str
) -> None:
    """Whichever way it falls. PRISM's rollouts: 512 for the warm-up's pairs, 40 x 64 and 40 x 256."""
    path = run_dir / "evals" / "rlvr.jsonl"
    path.write_text((run_dir / "evals" / f"{evaluation}.jsonl").read_text())
    config = json.dumps(yaml.safe_load((run_dir / "config.yaml").read_text()) | {"rlvr": {"updates_per_step": 2}})
    (run_dir / "config.yaml").write_text(config)
    page = report(run_dir)
    told = page.one("ul", css="verdicts").all("li")[0].text
    is_or_not = verdict if verdict.startswith("cannot") else f"is {verdict}"
    assert told.startswith(f"The whole of PRISM (warm-up, alignment, RLVR) {is_or_not}")
    assert "RLVR from SFT at 95 % confidence: " in told
    costs = "120 updates, 13,312 rollouts, 1 min 04 s against 80 updates, 10,240 rollouts, 20.0 s."
    assert told.endswith(f"Cost behind SFT, evaluation left out: {costs}")
    rows = {row.all("th")[0].text.strip(): row.all("td") for row in page.one(id="stages").one("tbody").all("tr")}
    behind = {name: [cell.text for cell in cells[-2:]] for name, cells in rows.items()}
    assert behind == {
        "SFT": ["–", "–"],
        "SFT continued": ["0", "20.0 s"],
        "RLVR from SFT": ["10,240", "20.0 s"],
        "Alignment": ["3,072", "44.0 s"],
        "RLVR": ["13,312", "1 min 04 s"],
    }


def test_without_the_control_or_its_records_nothing_is_claimed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=["sft", "warmup", "align", "rlvr"])
    told = report(run).one("ul", css="verdicts").all("li")[0].text
    whole = "the whole of PRISM (warm-up, alignment, RLVR)"
    assert told == f"Whether {whole} is better than RLVR from SFT cannot be said: no evaluation of RLVR from SFT."
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k != "rollout/responses"} for line in lines]
    old = [{k: v for k, v in line.items() if line["stage"] != "eval" or k != "time/seconds"} for line in old]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    rows = report(run).one(id="stages").one("tbody").all("tr")
    assert [cell.text for cell in rows[-1].all("td")[-2:]] == ["–", "–"]


def swap_evaluations(path: Path, a: str, b: str) -> None:
    first, second, third = (path / "evals" / name for name in (f"{a}.jsonl", f"{b}.jsonl", "swap"))
    first.rename(third)
    second.rename(first)
    third.rename(second)
    metrics = path / "metrics.jsonl"
    swapped = (
        metrics.read_text().replace(f'"after": "{a}"', '"after": "_"').replace(f'"after": "{b}"', f'"after": "{a}"')
    )
    metrics.write_text(swapped.replace('"after": "_"', f'"after": "{b}"'))


def test_sentences_follow_the_numbers(run_dir: Path) -> None:
    swap_evaluations(run_dir, "sft", "rlvr")  # now SFT is best
    told = report(run_dir).one("ul", css="verdicts").text
    assert "RLVR is below SFT at 95 % confidence: −" in told and "RLVR is above" not in told
    assert re.search(r"Alignment by itself changed held-out accuracy by −[\d.]+ \[.*\] .*: a loss at 95 %", told)
    shutil.copy(run_dir / "evals" / "sft.jsonl", run_dir / "evals" / "rlvr.jsonl")
    page = report(run_dir)
    told = page.one("ul", css="verdicts").text
    assert "RLVR cannot be told from SFT at 95 % confidence: 0.0 percentage points, p = 1.000, no interval" in told
    assert "RLVR: metrics.jsonl says an accuracy of" in page.one("ul", id="notes").text


def test_a_gain_within_the_interval_is_no_gain(run_dir: Path) -> None:
    items = [json.loads(line) for line in (run_dir / "evals" / "sft.jsonl").read_text().splitlines()]
    next(item for item in items if not item["correct"])["correct"] = 1
    (run_dir / "evals" / "rlvr.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (run_dir / "evals" / "align.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    page = report(run_dir)
    told = page.one("ul", css="verdicts").text
    assert "RLVR cannot be told from SFT at 95 % confidence: +0.4 percentage points, p = 1.000, no interval: 1" in told
    assert "p = 1.000, no interval: 1 image differs, it takes 20): not distinguishable from no effect." in told
    row = page.one("table", id="stages").one("tbody").all("tr")[4]
    assert row.all("td")[1].attributes["class"] == "flat"


def test_figures_cannot_end_their_element() -> None:
    value = {"</script><!--": ["<b>&"]}
    text = json_for_script(value)
    assert not set("<>&") & set(text) and json.loads(text) == value


def test_every_logged_metric_is_drawn_once_or_named(page: Element, finished_run: Path) -> None:
    run = read_run(finished_run)
    drawn = figures(page)
    titles = [caption.one("b").text for caption in page.one(id="stage-5").all("figcaption")]
    for title in (
        "Discriminator margin",
        "Discriminator accuracy",
        "Reward",
        "Response length",
        "Entropy",
        "Log-prob gap",
    ):
        assert titles.count(title) == 1
    assert {node.attributes["data-figure"] for node in page.all("div", css="plot")} == set(drawn)
    loss = run.series("sft", "sft/loss")
    raw = next(trace for trace in drawn["sft-0"]["data"] if trace["name"] == "training")
    assert raw["x"] == list(loss.steps) and raw["y"] == pytest.approx(loss.values, rel=1e-5)
    assert "Logged but not drawn: pairs/dropped, pairs/kept, warmup/aux." in page.one(id="stage-4").text
    target = next(
        f for f in drawn.values() if any(s["label"]["text"] == "target" for s in f["layout"].get("shapes", ()))
    )
    assert target["layout"]["shapes"][0]["y0"] == 1.0


def test_values_that_are_not_finite_become_gaps(run_dir: Path) -> None:
    append_lines(run_dir / "metrics.jsonl", [{"stage": "sft", "step": 41, "sft/loss": float("nan")}])
    drawn = figures(report(run_dir))
    assert drawn["sft-0"]["data"][0]["y"][-1] is None


MARKUP = '<script>alert("x")</script><img src=x onerror=alert(1)></p></div>&amp;'
NASTY = MARKUP + "\u202e\ud800\x00 שלום \"quoted' {{ 7 * 7 }} {% raw %}"


def nasty_run(path: Path) -> Path:
    """Hostile text in every place that data or a model can reach."""
    run = write_run(path, rollouts=False)
    for file in (run / "evals").glob("*.jsonl"):
        items = [json.loads(line) for line in file.read_text().splitlines()]
        items = [item | {"kind": NASTY if item["kind"] == "sum" else item["kind"], "text": NASTY} for item in items]
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
    (run / "config.yaml").write_text(
        json.dumps({"recipe": NASTY.replace("\ud800", ""), "stages": ["sft"], "seed": "<b>"})
    )
    (run / "environment.json").write_text(json.dumps({NASTY: NASTY}))
    append_lines(
        run / "metrics.jsonl", [{"stage": NASTY, "step": 1, NASTY: 1.0, "sft/" + NASTY: 2.0, "time/" + NASTY: 3.0}]
    )
    append_lines(run / "metrics.jsonl", [{"stage": "sft", "step": 1, "</script><script>alert(2)</script>": 1.0}])
    record = {
        "stage": "rlvr", "step": 1, "uid": NASTY, "group": 0, "question": NASTY, "kind": NASTY, "images": [],
        "text": f"<caption>{NASTY}</caption>", "valid": True, "spans": {"caption": [0, 5], "think": [5, 9]},
        "tokens": 3, "finish": NASTY, "scores": {NASTY: 1.0}, "advantage": 0.0,
        "reward": {"score": 1.0, "decided_by": NASTY},
        "ground_truth": NASTY, "teacher": {"caption": NASTY, "reasoning": NASTY}, "teacher_scores": {NASTY: 2.0},
    }  # fmt: skip
    write_frames(run / "rollouts" / "rlvr.jsonl.zst", [record])
    return run


def test_text_of_models_and_data_stays_text(tmp_path: Path) -> None:
    run = nasty_run(tmp_path / "run")
    page = report(run)  # parsing alone shows that no tag of the text opened or closed an element
    assert len(page.all("script")) == 3 and not page.all("img")
    assert all("onerror" not in element.attributes for element in page.all())
    shown = page.one("article").text
    assert shown.count(MARKUP + "⟨U+202E⟩\ufffd\u2400") >= 6
    assert "{{ 7 * 7 }}" in shown and "49" not in shown
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in text and "\x00" not in text
    names = [x for trace in figures(page)["accuracy"]["data"] for x in trace["x"]]
    assert any("&lt;script&gt;" in name for name in names) and not any("<" in name for name in names)


def test_rollouts_show_sections_scores_and_images(page: Element, finished_run: Path) -> None:
    articles = page.all("article")
    assert sum(len(article.all("div", css="card")) for article in articles) <= 60
    assert [article.one("h3").text.split(",")[0] for article in articles] == [
        *["RLVR from SFT"] * 5,
        *["Alignment"] * 5,
        *["RLVR"] * 5,
    ]
    buttons = page.one(id="picker").all("button")
    assert [int(button.attributes["data-group"]) for button in buttons] == list(range(15))
    article = articles[5]
    assert {mark.attributes["class"] for mark in article.all("mark")} == {"caption", "think", "answer"}
    assert (
        "teacher's caption" in article.text
        and "advantage" in article.text
        and "answer decided by number" in article.text
    )
    source = article.one("img").attributes["src"].removeprefix("data:image/png;base64,")
    stored = {file.read_bytes() for file in (finished_run / "rollouts" / "images").iterdir()}
    assert base64.b64decode(source) in stored
    assert article.one("img").attributes["class"] == "pixelated"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", stages=[]))
    told = page.text
    for sentence in (
        "No stage has been evaluated yet.",
        "No two stages have been evaluated on the same items yet",
        "No rollouts have been dumped.",
        "No wall-clock metrics were logged.",
        "Whether RLVR is better than SFT cannot be said: no evaluation of RLVR and SFT.",
        "The effect of alignment was not measured",
    ):
        assert sentence in told
    assert told.count("This stage has not run yet") == 6
    assert figures(page) == {} and not page.all("div", css="plot")


def test_stages_that_have_not_run_are_words_not_drawings(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", stages=["sft", "sft_continued", "warmup"]))
    assert set(figures(page)) & {"align-0", "rlvr-0"} == set()
    assert {trace["name"] for trace in figures(page)["accuracy"]["data"]} == {"SFT", "SFT continued"}
    rows = page.one("table", id="stages").one("tbody").all("tr")
    assert [row.text.split("\n")[-2].strip() for row in rows[2:]] == ["has not run"] * 3
    assert "This stage has not run yet" in page.one(id="stage-5").text
    assert "no evaluation of RLVR." in page.one("ul", css="verdicts").text


def test_running_and_dead_are_told_apart_by_the_last_write(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", stages=["sft"])
    (path / "evals" / "sft.jsonl").unlink()
    last = read_run(path).last_written()
    assert report(path, now=last + SILENT_AFTER - 1).one(id="state").text == "running"
    dead = report(path, now=last + SILENT_AFTER + 1)
    assert dead.one(id="state").text == "dead"
    assert "stopped in or after SFT, step 40" in dead.one("p", css="detail").text
    assert "trained, not evaluated yet" in dead.one("table", id="stages").text


def test_what_a_killed_run_left_is_shown_and_told(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl')
    dump = run_dir / "rollouts" / "rlvr.jsonl.zst"
    dump.write_bytes(dump.read_bytes()[:-20])
    evaluation = run_dir / "evals" / "rlvr.jsonl"
    evaluation.write_text(evaluation.read_text()[:-20])
    for image in (run_dir / "rollouts" / "images").iterdir():
        image.unlink()
    page = report(run_dir)
    notes = page.one("ul", id="notes").text
    assert "metrics.jsonl ends inside line" in notes and "ends inside a compressed frame" in notes
    assert "The evaluation of RLVR is not finished: 239 items so far." in notes and "so they are not compared" in notes
    assert "there is no paired comparison" in page.one("ul", css="verdicts").text
    assert "1 image(s) missing from the run directory" in page.text and len(page.all("article")) == 15


def test_an_evaluation_alone_is_complete(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", stages=["sft"])
    (path / "evals" / "sft.jsonl").rename(path / "evals" / "eval.jsonl")
    (path / "metrics.jsonl").write_text("")
    page = report(path)
    assert page.one(id="state").text == "complete"
    assert [row.one("th").text for row in page.one("table", id="stages").one("tbody").all("tr")] == ["eval"]


def test_speed_memory_and_parts_of_the_steps(page: Element) -> None:
    rows = {
        row.one("th").text: [cell.text for cell in row.all("td")]
        for row in page.one("table", id="speed").one("tbody").all("tr")
    }
    assert list(rows) == ["SFT", "SFT continued", "RLVR from SFT", "Discriminator warm-up", "Alignment", "RLVR"]
    # All tokens over all seconds: (0.4 s * 1500/s + 0.6 s * 1000/s) / 1 s.
    assert rows["RLVR"] == ["24.0 s", "40", "500 ms", "1,200", "140.0 MiB", "–"]
    body = page.one("table", id="times").all("tbody")[-1]
    parts = {row.one("th").text: [cell.text for cell in row.all("td")] for row in body.all("tr")}
    assert list(parts) == ["RLVR", "generate", "reward"], "the dearest first, and the pass counters elsewhere"
    assert parts["RLVR"][0] == "24.0 s" and parts["reward"] == ["0.4 s", "2 %", "10 ms"]
    assert "policy learned" in page.one("table", id="passes").text and "policy learned" not in body.text


def test_no_first_column_breaks_inside_short_words() -> None:
    """In a table as wide as the page, a cell that may break anywhere shrinks to one letter if nothing holds it open;
    and a table that is wider than the page scrolls by itself."""
    assets = Path(html.__file__).parent / "assets"
    style, template = (assets / "report.css").read_text(), (assets / "report.html.j2").read_text()
    rule = re.search(r"th:first-child \{([^}]*)\}", style)[1]
    assert "overflow-wrap: anywhere" in rule and "min-width: 9rem" in rule
    for columns in re.findall(r"repeat\(auto-fill, minmax\(([^;]*)\)", style):
        assert columns.startswith("min(") and "100%" in columns, "a column wider than a narrow page"
    assert len(re.findall(r'<div class="scroll">\s*<table', template)) == template.count("<table")


def test_parts_of_own_rewards_are_drawn(page: Element) -> None:
    stages = {
        section.one("h3").text.split("  ")[0].split(" 40")[0]: section for section in page.all("section", css="stage")
    }
    chart = next(f for f in stages["RLVR"].all("figure") if f.one("b").text == "Parts of the reward")
    traces = figures(page)[chart.one("div", css="plot").attributes["data-figure"]]["data"]
    assert {trace["name"] for trace in traces} == {"brevity", "two_words"}
    assert "reward/parts" not in stages["RLVR"].text and "Parts of" not in stages["Alignment"].text
