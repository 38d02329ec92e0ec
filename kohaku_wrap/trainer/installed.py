"""What is installed here: the trainer's checkout, its commit, and the versions of packages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import expand_user, kept_answer
from kohaku_wrap.processes import NoAnswer, ask_python
from kohaku_wrap.trainer.commits import find_known, installed_checkouts, is_checkout
from kohaku_wrap.trainer.git import read_commit
from kohaku_wrap.trainer.options import (
    OptionTable,
    cached_table_file,
    load_option_table,
    load_recorded_table,
    parse_table,
)

CHECKOUT_VARIABLE = "KWRAP_SD_SCRIPTS"
"""The environment variable that points at an existing sd-scripts checkout."""

DECISIVE_PACKAGES = frozenset(
    {
        # Tensors, kernels, ranks.
        "torch",
        "torchvision",
        "torchao",
        "triton",
        "tilelang",
        "xformers",
        "flash-attn",
        "sageattention",
        "apex",
        "transformer-engine",
        "accelerate",
        "deepspeed",
        "numpy",
        "scipy",
        "mkl",
        "tbb",
        # Models, networks, quantisation.
        "lycoris-lora",
        "bitsandbytes",
        "optimum-quanto",
        "diffusers",
        "transformers",
        "einops",
        "safetensors",
        # Tokens.
        "tokenizers",
        "regex",
        "ftfy",
        "sentencepiece",
        # Captions, sizes and options as they are read.
        "pyarrow",
        "toml",
        "voluptuous",
        # Pixels.
        "pillow",
        "imagesize",
        "albumentations",
        # Optimizers.
        "lion-pytorch",
        "schedulefree",
        "prodigyopt",
        "prodigy-plus-schedule-free",
        "dadaptation",
        "came-pytorch",
        "pytorch-optimizer",
        "adabelief-pytorch",
    }
)
"""Packages that compute what is trained, or read what it is computed from."""

DECISIVE_FAMILIES = ("nvidia-", "cuda-", "rocm", "intel-", "pytorch-triton", "triton-", "opencv-", "pillow-")
"""How the names of more of them begin: back ends of torch, and what comes in several builds."""

READ_TIMEOUT_SECONDS = 300


class UnreadableTrainer(KwrapError):
    """The trainer's own parser could not be asked."""


def find_trainer(commit: str = "") -> Path | None:
    """The sd-scripts checkout that kwrap would train with: KWRAP_SD_SCRIPTS, else the installed one at `commit`.

    The default where that commit is not installed; what is wrong with it is for `checkout.find_checkout`.
    """
    given = os.environ.get(CHECKOUT_VARIABLE)
    folders = [expand_user(given)] if given else installed_checkouts(commit)
    return next((folder.absolute() for folder in folders if is_checkout(folder)), None)


def read_trainer_commit(checkout: Path) -> str:
    """The commit of the checkout itself: by its files, which need no git, else the one that git names."""
    if known := find_known(checkout):
        return known.commit
    return read_commit(checkout) if (checkout / ".git").exists() else ""


def list_versions(folders: Sequence[Path] = ()) -> dict[str, str]:
    """Every installed package and its version, by name; of `folders` too, which come last on the import path."""
    found: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for dist in (*metadata.distributions(), *(metadata.distributions(path=[str(folder) for folder in folders]))):
        headers = dist.metadata  # read and parsed anew each time
        if headers and (name := headers["Name"]):
            # The first on the import path is the one that is imported.
            spellings.setdefault(plain_name(name), name)
            found.setdefault(spellings[plain_name(name)], headers["Version"])
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def plain_name(package: str) -> str:
    """A package's name in one spelling: `lycoris-lora` for `lycoris_lora`."""
    return package.lower().replace("_", "-").replace(".", "-")


def is_decisive(package: str) -> bool:
    """Whether another version of a package can change bits of what is trained."""
    name = plain_name(package)
    return name in DECISIVE_PACKAGES or name.startswith(DECISIVE_FAMILIES)


def find_option_table(*, read_live: bool = True) -> OptionTable:
    """The options of the installed trainer, asked once per commit; the recorded table where there is none.

    With `read_live` False a commit that was never asked is answered from the recorded table.
    """
    checkout = find_trainer()
    if checkout is None:
        return load_recorded_table()
    commit = read_trainer_commit(checkout)
    if not read_live or not commit:
        return load_option_table(commit)
    return kept_answer(
        cached_table_file(commit),
        lambda table: parse_table(table, f"sd-scripts {commit[:7]}"),
        lambda: ask_trainer(checkout),
    )


def ask_reader(worker: str, argument: str) -> Any:
    """The answer of a worker that reads what only an import can tell. Raises NoAnswer."""
    return ask_python(
        f"kohaku_wrap.planning.workers.{worker}",
        argument,
        added={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout_seconds=READ_TIMEOUT_SECONDS,
    )


def ask_optimizer(path: str) -> list[str] | None:
    """The arguments of an optimizer class `module.Class` from its own signature, asked once per version of a package.

    Imports the module, in a process of its own: only for known and trusted ones. None where it cannot be imported, or
    takes any argument.
    """
    try:
        version = metadata.version(path.split(".")[0].replace("_", "-"))
        kept = cached_table_file(f"optimizer-{path}-{version}")
    except metadata.PackageNotFoundError:
        kept = None  # a file of the person's own, which changes
    with suppress(NoAnswer):
        return kept_answer(kept, lambda found: read_arguments(found[path]), lambda: ask_reader("list_optimizers", path))
    return None


def read_arguments(optimizer: Mapping[str, Any]) -> list[str] | None:
    """The names of its arguments; None where it takes any."""
    arguments = optimizer["arguments"]
    return None if arguments is None else [*map(str, arguments)]


def ask_trainer(checkout: Path) -> Any:
    """The options of a checkout, read from its own parser in a process of its own. Raises UnreadableTrainer."""
    try:
        return ask_reader("list_options", str(checkout))
    except NoAnswer as failed:
        raise UnreadableTrainer(
            f"{checkout}: its parser could not be read: {failed.message}",
            "Run `kwrap doctor --engine sd-scripts`; it names the package that is missing.",
        ) from None
