"""What `sample` and `evaluate` share: options of models and of computing, and what is drawn or measured with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.next_steps import read_site_paths
from kohaku_wrap.cli.options import PATH, open_run, option_group
from kohaku_wrap.cli.output import progress_bar
from kohaku_wrap.errors import UsageError
from kohaku_wrap.sampling.cells import MOST_STEPS

if TYPE_CHECKING:
    from kohaku_wrap.formats.predictions import Prediction
    from kohaku_wrap.merging.hashes import FileHashes
    from kohaku_wrap.sampling.checkpoints import Model
    from kohaku_wrap.sampling.expanding import KnownModel
    from kohaku_wrap.sampling.running import DrawingJob
    from kohaku_wrap.sampling.sheets import Sheet


COMPUTE_NAMES = ("device", "dtype", "vae_dtype", "batch", "threads")

network_option = click.option(
    "--network", "networks", multiple=True, metavar="NET[:W]", help="Added to each MODEL; repeatable."
)
vae_option = click.option("--vae", type=PATH, metavar="FILE", help="Usually the run's, or the MODEL's own.")
negative_option = click.option("--negative", default="", metavar="TEXT", help="The negative prompt.")
sampler_steps_option = click.option(
    "--sampler-steps", type=click.IntRange(1, MOST_STEPS), metavar="N", help="Usually 24."
)
prediction_option = click.option(
    "--prediction", type=click.Choice(("epsilon", "v")), help="Usually what the model's file says."
)
device_option = click.option("--device", type=click.Choice(("cpu", "cuda")), help="Usually a GPU where there is one.")
dtype_option = click.option(
    "--dtype", type=click.Choice(("fp32", "fp16", "bf16")), help="Usually fp16 on a GPU, else fp32."
)
batch_option = click.option(
    "--batch", type=click.IntRange(1, 256), metavar="N", help="Rows of each forward; GPU 4, CPU 1."
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes; each its own GPU."
)
tokenizers_option = click.option("--tokenizers", type=PATH, metavar="DIR", help="Both CLIP tokenizers.")


model_options = option_group(
    network_option,
    vae_option,
    click.option("--run", metavar="RUN", help="The networks that a run kept."),
    click.option("--steps", metavar="all|N,M", help="With --run: at these optimizer steps; usually its newest."),
)
"""What is added to models, or which run they are of."""


drawing_options = option_group(
    device_option,
    dtype_option,
    click.option("--vae-dtype", type=click.Choice(("fp32", "fp16", "bf16")), help="Usually fp32: SDXL's overflows."),
    batch_option,
    click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Of the processor, a process."),
    jobs_option,
    click.option("--offload", is_flag=True, help="For small cards: parts are on the GPU only while they are used."),
    tokenizers_option,
)
"""Who draws, how the numbers are computed (bits differ between two such ways), and with what beside the models."""


def choose_sheet(path: Path | None, texts: tuple[str, ...], asked: dict[str, Any]) -> Sheet:
    """The sheet of --prompts or of --prompt, with what the command line says over it."""
    from kohaku_wrap.sampling import sheets
    from kohaku_wrap.sampling.grammar import parse_prompt
    from kohaku_wrap.sampling.styles import find_style

    if bool(texts) == (path is not None):
        what = "--prompt and --prompts cannot be combined" if texts else "no prompt is given"
        raise UsageError(
            what,
            'Give --prompt TEXT, for example --prompt "1girl, smile", or --prompts FILE, a prompt a line or a sheet.',
        )
    for text in (*texts, asked["negative"]):
        parse_prompt(text, asked["lenient"])
    sheet = sheets.read_sheet(path, asked["lenient"]) if path else sheets.Sheet(tuple(map(sheets.SheetPrompt, texts)))
    names = ("seeds", "sizes", "guidances", "hires", "negative", "sampler", "schedule", "clip_skip", "emphasis")
    styles = tuple(None if name == sheets.NO_STYLE else find_style(name) for name in asked["styles"])
    over = {name: asked[name] for name in names} | {"styles": styles, "steps": asked["sampler_steps"]}
    return replace(sheet, **{name: value for name, value in over.items() if value})


def list_models(checkpoints: tuple[Path, ...], asked: dict[str, Any], site: Path | None) -> list[Model]:
    """The models that are named, or those of a run. Raises NoModel, and what checking their headers raises."""
    from kohaku_wrap.sampling.checkpoints import Model, NoModel, check_model, read_network

    added = tuple(map(read_network, asked["networks"]))
    run, steps, vae = asked["run"], asked["steps"], asked["vae"]
    if run is not None and checkpoints:
        raise UsageError("MODEL and --run cannot be combined", "Give the one or the other.")
    if steps is not None and run is None:
        raise UsageError("--steps is of a run: --run is missing", "The sampler's steps are --sampler-steps.")
    if run is not None:
        from kohaku_wrap.sampling.of_runs import models_of_run

        found = models_of_run(open_run(run, site), steps, vae)
        return [replace(model, networks=(*model.networks, *added)) for model in found]
    if not checkpoints:
        raise NoModel("no model is named", "Give the path of an SDXL checkpoint, or --run RUN.")
    listed = [Model(path, added, vae=vae) for path in dict.fromkeys(checkpoints)]
    for model in listed:
        check_model(model)
    return listed


def know_models(
    models: list[Model], asked: dict[str, Any], site: Path | None
) -> tuple[list[KnownModel], dict[Path, FileHashes]]:
    """The models with what their files say, and the hashes of these files."""
    from kohaku_wrap.sampling.checkpoints import hash_models, identify_model
    from kohaku_wrap.sampling.expanding import KnownModel

    with progress_bar("hash", "bytes") as report:
        hashes = hash_models(models, report)
    known = [KnownModel(each, identify_model(each, hashes), choose_prediction(each, asked, site)) for each in models]
    return known, hashes


def choose_tokenizers(folder: Path | None, site: Path | None, models: list[Model]) -> tuple[Path, Path]:
    """The folders of both tokenizers: as named, of the site, beside the first model, or of the hub's cache.

    A site file is looked for here, beside the model and one folder above.
    """
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.sampling.chunks import find_tokenizers

    beside = models[0].path.absolute().parent
    for near in () if site else (Path(), beside, beside.parent):
        paths = read_site_paths(near)
        folder = folder or (paths.tokenizers if paths else None)
    if folder is None and site:
        folder = load_site(site).paths.tokenizers
    if folder is None:
        found_in = (beside / "tokenizers", beside)
        folder = next((each for each in found_in if any((*each.glob("vocab.json"), *each.glob("*/vocab.json")))), None)
    if found := find_tokenizers(folder):
        return found
    raise UsageError(
        "no tokenizers are known here", "Name the folder of both CLIP tokenizers: --tokenizers DIR, or in site.toml."
    )


def choose_prediction(model: Model, asked: dict[str, Any], site: Path | None) -> Prediction:
    """What the model predicts: as asked for, by the template, by the run's lock, or by its file."""
    from kohaku_wrap.config.layers import load_layers
    from kohaku_wrap.formats.predictions import Prediction, find_prediction
    from kohaku_wrap.formats.safetensors import read_header
    from kohaku_wrap.sampling.of_runs import prediction_of_run

    if asked["prediction"]:
        return Prediction(asked["prediction"], bool(asked["zero_terminal_snr"]), "--prediction")
    if asked["template"]:
        effective, _ = load_layers(asked["template"])
        kind = "v" if effective.get("v_parameterization") else "epsilon"
        return Prediction(kind, bool(effective.get("zero_terminal_snr")), f"the template {asked['template']}")
    if asked["run"] is not None and (said := prediction_of_run(open_run(asked["run"], site))):
        return said
    found = find_prediction(read_header(model.path))
    return replace(found, zero_terminal_snr=True) if asked["zero_terminal_snr"] else found


def prepare(sheet: Sheet, models: list[Model], asked: dict[str, Any], site: Path | None, out: Path) -> DrawingJob:
    """The cells of the sheet with these models."""
    from kohaku_wrap.dataset.recipe import load_dataset
    from kohaku_wrap.sampling.chunks import digest_tokenizers
    from kohaku_wrap.sampling.devices import choose_compute, usual_size
    from kohaku_wrap.sampling.expanding import Defaults, expand_sheet
    from kohaku_wrap.sampling.running import DrawingJob

    folders = choose_tokenizers(asked["tokenizers"], site, models)
    compute = choose_compute(*(asked[name] for name in COMPUTE_NAMES))
    known, hashes = know_models(models, asked, site)
    size = usual_size(models[0].path)
    defaults = Defaults(compute, digest_tokenizers(folders), size=size, lenient=asked["lenient"])
    cells = expand_sheet(sheet, known, defaults, load_dataset("epsilon").caption)
    return DrawingJob(cells, known, hashes, folders, out, asked["jobs"], asked["offload"])
