"""What is drawn of a run: its base model with the networks that it kept, and the sheet of its `[samples]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kohaku_wrap.config.trainer_arguments import escape_tags
from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import Progress
from kohaku_wrap.formats.predictions import Prediction, find_prediction
from kohaku_wrap.sampling.cells import Compute
from kohaku_wrap.sampling.checkpoints import (
    AddedNetwork,
    Model,
    NoModel,
    check_model,
    hash_models,
    identify_model,
)
from kohaku_wrap.sampling.chunks import digest_tokenizers, find_tokenizers
from kohaku_wrap.sampling.contact_sheet import write_contact_sheets
from kohaku_wrap.sampling.expanding import Defaults, KnownModel, expand_sheet
from kohaku_wrap.sampling.running import DrawingJob, draw_sheet, find_waiting
from kohaku_wrap.sampling.sheets import Sheet, SheetPrompt
from kohaku_wrap.training.comparing.places import read_places
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.networks import shorter_end, step_of_network
from kohaku_wrap.training.records.samples import Pictures, list_pictures


def models_of_run(run: Run, steps: str | None, vae: Path | None = None) -> list[Model]:
    """The run's base model with each network that it kept and that is asked for: the newest, `all`, or `N,M`.

    Raises NoModel, UsageError, and what checking the files' headers raises.
    """
    end = shorter_end(run) or run.lock.total_optimizer_steps
    kept: dict[int, Path] = {}
    for path in run.network_files:
        step = step_of_network(run, path, end) if path.suffix == ".safetensors" else None
        if step is not None:
            kept[step] = path
    if not kept:
        raise NoModel(
            f"{run.checkpoints}: the run has kept no network yet", f"See {command_line('status', run.folder)}."
        )
    if steps is None:
        wanted = [max(kept)]
    elif steps == "all":
        wanted = sorted(kept)
    else:
        named = [each.strip() for each in steps.split(",")]
        missing = [each for each in named if not each.isdecimal() or int(each) not in kept]
        if missing:
            there = ", ".join(map(str, sorted(kept)))
            raise UsageError(
                f"--steps: there is no network of step {', '.join(missing)}", f"There are {there}, or all."
            )
        wanted = [int(each) for each in named]
    models = [model_of_run(run, step, kept[step], vae) for step in wanted]
    for model in models:
        check_model(model)
    return models


def model_of_run(run: Run, step: int, network: Path, vae: Path | None = None) -> Model:
    """The run's base model with one of its networks, and with `vae` or the VAE that it trains with."""
    options, name = read_places(run).options, run.output_name
    vae = vae or (Path(options["vae"]) if options.get("vae") else None)
    label = name if network.stem == name else f"{name} step {step}"
    return Model(Path(options.get("pretrained_model_name_or_path", "")), (AddedNetwork(network),), label, step, vae)


def prediction_of_run(run: Run) -> Prediction | None:
    """What the run's model predicts by the word of its lock."""
    values = run.lock.values
    if "v_parameterization" not in values:
        return None
    kind = "v" if values["v_parameterization"] else "epsilon"
    return Prediction(kind, bool(values.get("zero_terminal_snr")), f"the lock of the run {run.name}")


def sheet_of_run(run: Run) -> Sheet:
    """What `[samples]` asks to be drawn of each network. Raises UsageError where it asks nothing of kwrap."""
    asked = run.lock.table("samples")
    if "by" not in asked:
        raise UsageError(
            f"run {run.name} asks for no pictures by kwrap",
            'Draw with --prompt TEXT, or train a new run with every = N and by = "kwrap" in [samples].',
        )
    prompts = [
        SheetPrompt(escape_tags(prompt), own={"seed": int(asked["seed"]) + place})
        for place, prompt in enumerate(asked["prompts"])
    ]
    return Sheet(
        tuple(prompts), sizes=((asked["width"], asked["height"]),), guidances=(float(asked["guidance"]),),
        negative=escape_tags(asked.get("negative", "")), steps=asked["steps"],
    )  # fmt: skip


def job_of_run(run: Run, pictures: Pictures, compute: Compute, on_bytes: Progress) -> DrawingJob:
    """The pictures of one network of the run."""
    model = model_of_run(run, pictures.optimizer_step, pictures.network)
    header = check_model(model)
    folder = read_places(run).options.get("tokenizer_cache_dir")
    folders = find_tokenizers(Path(folder) if folder else None)
    if folders is None:
        raise KwrapError(f"run {run.name}: its tokenizers are not here", "Set paths.tokenizers in its site file.")
    hashes = hash_models([model], on_bytes)
    known = KnownModel(model, identify_model(model, hashes), prediction_of_run(run) or find_prediction(header))
    defaults = Defaults(compute, digest_tokenizers(folders))
    cells = expand_sheet(sheet_of_run(run), [known], defaults, load_dataset("epsilon").caption)
    return DrawingJob(cells, [known], hashes, folders, pictures.folder)


def draw_queue(run: Run, compute: Compute, on_bytes: Progress, on_picture: Progress) -> Iterator[Pictures]:
    """Draw what `[samples]` asks for and is not drawn, the oldest network first; each as it is done.

    A network that the run removed meanwhile is left out.
    """
    sheet_of_run(run)
    for pictures in list_pictures(run):
        if pictures.are_drawn or not pictures.network.is_file():
            continue
        try:
            job = job_of_run(run, pictures, compute, on_bytes)
            draw_sheet(job, find_waiting(job), on_picture)
            write_contact_sheets(job.out, job.cells)
        except (KwrapError, OSError):
            if pictures.network.is_file():
                raise
            continue
        yield pictures
