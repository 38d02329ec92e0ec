"""Pictures, data and the way on the page, from what the commands themselves leave behind."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image
from plain_runs import train
from reading_pages import HOSTILE, Page, make_page

from kohaku_wrap.cli import program
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import load_site
from kohaku_wrap.config.training_data import read_training_sizes
from kohaku_wrap.dataset.captions.summary import CaptionSummary, summarise_captions
from kohaku_wrap.errors import command_line
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import read_captions_metadata
from kohaku_wrap.formats.data_summary import SUMMARY_FILE, read_summary
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.reporting import pictures
from kohaku_wrap.reporting.page import compose_page, write_page
from kohaku_wrap.reporting.pictures import list_pictures, make_gallery
from kohaku_wrap.sampling.lint import vocabulary_of_captions
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.run_data import keep_run_data

NewRun = Callable[..., Run]


def kwrap(*words: object) -> str:
    result = CliRunner().invoke(program, list(map(str, words)))
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("way") / "world"
    kwrap("demo", folder, "--posts", 40)
    kwrap("select", "demo", "--db", folder / "danbooru.db", "--out", folder / "demo.parquet")
    kwrap("extract", folder / "demo.parquet", "--tars", folder / "tars", "--out", folder / "images", "--jobs", 1)
    (next((folder / "images").glob("0*/*.jpg"), None) or next((folder / "images").glob("0*/*.png"))).unlink()
    words = ("--format", "cache", "--dataset", "demo")
    kwrap("caption", folder / "demo.parquet", "--db", folder / "danbooru.db", "--out", folder / "images", *words)
    return folder


def split_caption(text: str) -> list[str]:
    return [each.strip() for part in text.split("|||") for each in part.split(",")]


def test_captions_leave_a_summary_that_counts_what_is_there(world: Path) -> None:
    images = world / "images"
    columns = Columns.open(images)
    found = read_summary(images, columns.digest)
    assert found["images"] == len(columns) == sum(found["ratings"].values()) == sum(found["years"].values())
    assert found["selected"] == len(columns) + 1 and found["missing_images"] == 1
    captions = [columns.caption_of(row) for row in range(len(columns))]
    for word, count in [*found["frequent_tags"], *found["rare_tags"], *found["words"]["quality"]]:
        assert count == sum(
            word in [each.strip() for part in text.split("|||") for each in part.split(",")] for text in captions
        )
    assert found["frequent_tags"] == sorted(found["frequent_tags"], key=lambda each: (-each[1], each[0]))
    selected = json.loads(
        kwrap("select", "demo", "--db", world / "danbooru.db", "--out", world / "again.parquet", "--json")
    )
    assert found["dropped"] == selected["dropped"] and found["seed"] == selected["seed"]
    for name in ("select", "extract", "caption"):
        kwrap(
            *__import__("shlex").split(found["made_by"][name])[1:], *(("--max-missing", 1) if name == "extract" else ())
        )
    assert found["made_by"]["caption"].endswith("--dataset demo --format cache")
    assert read_summary(images, "another digest") == {}


def test_imported_captions_have_a_summary_too(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name, text in (("one", "1girl, smile"), ("two", "1girl, hat")):
        Image.effect_noise((160, 96), 60).convert("RGB").save(tmp_path / "own" / f"{name}.png")
        (tmp_path / "own" / f"{name}.txt").write_text(text)
    given = ("--label", "a b", "--plain", "--copy")
    kwrap("import", tmp_path / "own", "--out", tmp_path / "images", *given)
    digest = read_captions_metadata(tmp_path / "images")["digest"]
    found = read_summary(tmp_path / "images", digest)
    assert found["frequent_tags"] == [["1girl", 2], ["hat", 1], ["smile", 1]] and found["images"] == 2
    words = ("import", tmp_path / "own", "--out", tmp_path / "images", *given)
    assert found["made_by"] == {"import": command_line(*words)}


def test_of_captions_of_several_lines_the_first_is_shown_and_counted(world: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    Image.effect_noise((160, 96), 60).convert("RGB").save(tmp_path / "own" / "one.png")
    (tmp_path / "own" / "one.txt").write_text("mydog, smile\nnever trained, words " + "word " * 90)
    kwrap("import", tmp_path / "own", "--out", tmp_path / "images")
    found = summarise_captions(tmp_path / "images", {})
    assert found["frequent_tags"] == [("mydog", 1), ("smile", 1)]
    assert found["tokens"]["longer_than"]["75"] == 0
    assert vocabulary_of_captions(tmp_path / "images").count("never trained") is None
    effective = resolve_template("demo", load_site(world / "site.toml"), ())
    plan = plan_steps(effective, read_training_sizes(effective, tmp_path / "images"))
    keep_run_data(tmp_path, effective, tmp_path / "images", plan)
    digest = read_captions_metadata(tmp_path / "images")["digest"]
    assert [each["caption"] for each in read_summary(tmp_path, digest)["examples"]] == ["mydog, smile"]


def test_of_many_captions_an_even_part_is_looked_at(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = len(Columns.open(world / "images"))
    monkeypatch.setattr("kohaku_wrap.dataset.captions.summary.CAPTIONS_LOOKED_AT", rows // 3)
    found = summarise_captions(world / "images", {})
    assert found["captions_looked_at"] == -(-rows // 3) and found["images"] == rows


def test_however_captions_come_in_stretches_the_summary_is_the_same(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohaku_wrap.dataset.captions.summary.CAPTIONS_LOOKED_AT", 12)
    monkeypatch.setattr("kohaku_wrap.dataset.captions.summary.LENGTHS_LOOKED_AT", 7)
    columns = Columns.open(world / "images")
    captions = pa.array([columns.caption_of(row) for row in range(len(columns))])
    summary = CaptionSummary(len(captions))
    whole = summary.describe([summary.look_at(0, captions)], {})
    assert whole == summarise_captions(world / "images", {}) and whole["tokens"]["captions"] == 7
    for size in (1, 2, 3, 5, 7, len(captions) - 1):
        seen = [summary.look_at(first, captions.slice(first, size)) for first in range(0, len(captions), size)]
        assert summary.describe(seen[::-1], {}) == whole


def test_a_new_run_keeps_buckets_and_examples_as_they_are_trained(world: Path, tmp_path: Path) -> None:
    site = load_site(world / "site.toml")
    effective = resolve_template("demo", site, ())
    plan = plan_steps(effective, read_training_sizes(effective, world / "images"))
    keep_run_data(tmp_path, effective, world / "images", plan)
    columns = Columns.open(world / "images")
    found = read_summary(tmp_path, columns.digest)
    assert sum(images for _, _, images, _ in found["buckets"]) == len(columns) == found["images"]
    assert len(found["examples"]) == 20
    for each in found["examples"]:
        row = columns.ids.tolist().index(each["id"])
        assert each["caption"] == columns.caption_of(row)
        assert [each["width"], each["height"]] in [bucket[:2] for bucket in found["buckets"]]
        size = Image.open(io.BytesIO(base64.b64decode(each["picture"]))).size
        assert size[0] / size[1] == pytest.approx(each["width"] / each["height"], rel=0.02)
    keep_run_data(tmp_path / "nowhere", effective, tmp_path / "no-images", plan)
    assert not (tmp_path / "nowhere").exists()


def draw(folder: Path, name: str, colour: str = "red") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(folder / name)
    return folder / name


def add_pictures(run: Run) -> None:
    """What `kwrap sample` and sd-scripts leave in a run, with names of their own and hostile labels."""
    for step in (2, 4):
        folder = run.folder / "samples" / f"optimizer-step-{step:08d}"
        draw(folder, f"a_1_{step:012x}.png", ("red", "green")[step // 4])
        draw(folder, f"b {HOSTILE.replace('/', '')} #?%.png", "blue")
        draw(folder, "contact-sheet.png")
        draw(folder, ".half.png")
        labels = {f"a_1_{step:012x}.png": {"prompt": f"1: {HOSTILE}", "style": "none", "seed": "seed 1"}}
        document = {"format": 1, "files": {}, "tokenizers": {}, "pictures": labels}
        (folder / "sheet.json").write_text(json.dumps(document))
    draw(run.checkpoints / "sample", "r_000002_00_20261126050000_7.png")
    draw(run.checkpoints / "sample", "r_e000001_00_20261126050100.png")
    draw(run.checkpoints / "sample", "of-another-tool.png")


def test_pictures_are_found_by_prompt_and_step(new_run: NewRun) -> None:
    run = new_run("drawn")
    add_pictures(run)
    found = sorted((each.step, each.row) for each in list_pictures(run))
    per_epoch = run.lock.count.optimizer_steps_per_epoch
    other = f"b {HOSTILE} #?%"
    assert found == sorted(
        [(step, row) for step in (2, 4) for row in (f"1: {HOSTILE}, seed 1", other)]
        + [(2, "prompt 1"), (per_epoch, "prompt 1")]
    )
    page = make_page(run)
    shown = page.data["runs"][0]["pictures"]
    assert shown["steps"] == sorted({2, 4, per_epoch})
    assert all(
        address.startswith("data:image/png;base64,") for row in shown["rows"] for address in row["cells"].values()
    )


def test_pictures_that_were_asked_for_stand_at_their_steps(new_run: NewRun) -> None:
    run = new_run("asked")
    folder = run.samples / "asked"
    for name in ("a_1.png", "b_1.png", "c_1.png", "contact-sheet.png", "unknown.png"):
        draw(folder, name)
    labels = {"prompt": "1: hat", "style": "none", "seed": "seed 1"}
    pictures = {
        "a_1.png": {**labels, "optimizer_step": 4},
        "b_1.png": {**labels, "optimizer_step": None},
        "c_1.png": {**labels, "optimizer_step": 4},
        "../../run.lock.toml": {**labels, "optimizer_step": 2},
        "gone.png": {**labels, "optimizer_step": 2},
    }
    document = {"format": 1, "files": {}, "tokenizers": {}, "pictures": pictures}
    (folder / "sheet.json").write_text(json.dumps(document))
    assert [(each.step, each.row) for each in list_pictures(run)] == [(4, "1: hat, seed 1")] * 2
    shown = make_gallery(run, None).rows
    assert [(row, list(cells)) for row, cells in shown] == [("1: hat, seed 1", [4]), ("1: hat, seed 1, c_1", [4])]


def test_large_pictures_stay_beside_the_page(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.parse import unquote_to_bytes

    monkeypatch.setattr(pictures, "INLINE_BYTES", 100)
    run = new_run("beside")
    add_pictures(run)
    page = make_page(run, out=run.folder.parent / "pages" / "p.html")
    for row in page.data["runs"][0]["pictures"]["rows"]:
        for address in row["cells"].values():
            target = (run.folder.parent / "pages" / unquote_to_bytes(address).decode()).resolve()
            assert target.is_file() and target.is_relative_to(run.folder)
    assert "The pictures lie beside this page" in page.text


def test_results_of_evaluations_are_laid_out_and_others_named(new_run: NewRun) -> None:
    run = new_run("judged")
    folder = run.folder / "evaluation"
    (folder / "other").mkdir(parents=True)
    models = [{"title": f"{HOSTILE}{place}", "optimizer_step": place, "score": {"mean": 0.5}, "above_0.9": 2,
               "curve": [0.25, 1.0, 0.75], "scores": {"a": {"score": 1}}} for place in (1, 2)]  # fmt: skip
    ccip = {"format": 1, "measure": "ccip", "judge": {"title": "tiny", "threshold": 0.17}, "models": models}
    (folder / "ccip.json").write_text(json.dumps(ccip))
    (folder / "other" / "exposure.json").write_text(
        '{"command": "evaluate exposure", "rows": [{"tag": "hat", "seen": 7}]}'
    )
    odd = {"torn": "{", "list": "[1]", "deep": '{"a":' * 500 + "1" + "}" * 500, "loose": '{"a": NaN, "b": [Infinity]}'}
    for name, text in odd.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "folder.json").mkdir()
    (folder / "[bracket]*.json").write_text('{"measure": "mine", "curve": "none", "models": [{"curve": [2]}]}')
    page = make_page(run)
    shown = page.data["runs"][0]["evaluation"]
    assert shown["ccip.json"] == ccip and shown["torn.json"] == shown["list.json"] == shown["deep.json"] == {}
    assert shown["loose.json"] == {"a": "NaN", "b": ["Infinity"]} and shown["[bracket]*.json"]["measure"] == "mine"
    for name in ("torn", "list", "deep", "folder"):
        assert f"{name}.json: not a result that can be read." in page.text
    places = [
        attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("data-axis") == "place"
    ]
    (drawn,) = places
    assert (float(str(drawn["data-x-high"])), float(str(drawn["data-y-low"]))) == (3.0, 0.0)
    assert "score: mean" in page.text and "judge: threshold" in page.text and "hat" in page.text
    assert [tag for tag, _ in page.elements].count("img") == 1
    compose_page([run], None)


@pytest.mark.parametrize("inline_bytes", [6_000_000, 100], ids=["pictures inside", "none"])
def test_a_page_to_publish_names_no_place_of_the_machine(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    monkeypatch.setattr(pictures, "INLINE_BYTES", inline_bytes)
    home = tmp_path / "home" / "annabel"
    run = new_run(str(home / "runs" / "shown"), values={"vae": str(home / "vae.pt"), "logging_dir": "/data/annabel/l"})
    train(run)
    add_pictures(run)
    (run.folder / "command.txt").write_text(f"{home}/bin/kwrap train test --site {home}/site.toml --run shown\n")
    layers = {"vae": f"site {home}/site.toml"}
    (run.folder / "layers.json").write_text(json.dumps(layers))
    (run.folder / "evaluation").mkdir()
    told = {"command": f"evaluate {home}/x", "judge": str(home / "judges" / "ccip"), "scores": {str(home / "a"): 1}}
    (run.folder / "evaluation" / "ccip.json").write_text(json.dumps(told))
    made_by = {"caption": f"kwrap caption {home}/a.parquet --out {home}/images"}
    summary = {"format": 1, "captions_digest": run.lock.dataset_digest, "made_by": made_by, "images": 3,
               "examples": [{"id": 1, "caption": "1girl", "width": 8, "height": 8, "picture": "AAAA"}]}  # fmt: skip
    (run.folder / SUMMARY_FILE).write_text(json.dumps(summary))
    own = run.folder / "report.html"
    write_page([run], own)
    assert "annabel" in own.read_text(encoding="utf-8")
    path = tmp_path / "public.html"
    path.write_text(compose_page([run], None), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    assert "annabel" not in text and str(tmp_path) not in text and str(Path.home()) not in text
    page = Page(path)
    assert "kwrap caption a.parquet --out images" in page.text and "vae.pt" in page.text and "1girl" in page.text
    assert "data:image/jpeg" not in text and "Next:" not in page.text
    assert ("data:image/png" in text) == (inline_bytes > 100) and 'href=".' not in text
    assert ("too large for this page" in page.text) == (inline_bytes == 100)


def test_plan_keeps_a_summary_where_there_is_none(world: Path) -> None:
    path = world / "images" / SUMMARY_FILE
    before = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    words = ("plan", "demo", "--site", world / "site.toml", "--no-modules")
    kwrap(*words)
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("images", "frequent_tags", "rare_tags", "tokens", "captions_digest"):
        assert found[name] == before[name], name
    assert found["words"]["quality"] == before["words"]["quality"]
    kept = path.stat()
    kwrap(*words)
    assert path.stat().st_mtime_ns == kept.st_mtime_ns and path.stat().st_ino == kept.st_ino


def test_the_way_has_each_digest_and_a_command(new_run: NewRun) -> None:
    run = new_run("way")
    train(run)
    (run.folder / "command.txt").write_text("/somewhere/bin/kwrap train test --run 'way out'\nrest\n")
    page = make_page(run)
    steps = {step["title"]: step for step in page.data["runs"][0]["way"]}
    assert steps["Images and captions"]["things"][0]["sha256"] == run.lock.dataset_digest
    written = json.loads((run.attempts / "1" / "networks.json").read_text())
    assert {each["name"]: each["sha256"] for each in steps["Checkpoints"]["things"]} == written
    assert all(sha256 in page.text for sha256 in written.values())
    assert len(steps["States"]["things"]) == len(list(run.states.iterdir()))
    assert SUMMARY_FILE not in [path.name for path in run.folder.iterdir()]
    assert "No summary of the data is kept. kwrap caption" in page.text
