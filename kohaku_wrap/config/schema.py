"""The keys of a template that are kwrap's own, and those that hold a path."""

from __future__ import annotations

from collections.abc import Mapping

from kohaku_wrap.trainer.options import Option

HEADER_KEYS = ("title", "notes", "extends")
"""What a template says about itself, at its top."""

ARGUMENT_TABLES = ("network_args", "optimizer_args", "lr_scheduler_args")
"""Tables that are rendered into sd-scripts' lists of `key=value` strings."""

OWN_TABLES: Mapping[str, Mapping[str, Option]] = {
    "kwrap": {
        "data": Option("data", ("str",), choices=("kwrap", "sd-scripts"), default="kwrap"),
        "dataset": Option("dataset", ("str",)),
    },
    "states": {
        "keep": Option("keep", ("int",), default=3),
        "every": Option("every", ("int",)),
    },
    "cache": {
        "latents": Option("latents", ("bool",), default=False),
        "keep": Option("keep", ("str",), choices=("moments", "sample"), default="moments"),
        "precision": Option("precision", ("str",), choices=("fp16", "fp32"), default="fp16"),
        "text_encoders": Option("text_encoders", ("bool",), default=False),
    },
    "samples": {
        "by": Option("by", ("str",), choices=("trainer", "kwrap")),
        "prompts": Option("prompts", ("str",), many=True, split_by_commas=False),
        "negative": Option("negative", ("str",)),
        "every": Option("every", ("int",)),
        "width": Option("width", ("int",)),
        "height": Option("height", ("int",)),
        "steps": Option("steps", ("int",)),
        "guidance": Option("guidance", ("float",), default=6.0),
        "seed": Option("seed", ("int",), default=1),
    },
    "validation": {
        "posts": Option("posts", ("int",), default=0),
        "every": Option("every", ("int",), default=500),
        "timesteps": Option("timesteps", ("int",), default=9),
        "batch": Option("batch", ("int",), default=4),
    },
}
"""kwrap's own tables: `[kwrap]`, `[states]`, `[cache]`, `[samples]`, `[validation]`."""

EFFECTIVE_BATCH = Option("effective_batch", ("int",))
"""Images per optimizer step over all processes, in any section."""

TABLES = (*ARGUMENT_TABLES, *OWN_TABLES, "dataset_options", "preset")
"""Tables with a meaning; every other table is a section for people."""

NETWORK_FILES = ("base_weights", "network_weights")
"""Options that name networks to begin with, which decide the weights by their content."""

PATH_OPTIONS = frozenset(
    {
        *NETWORK_FILES,
        "console_log_file",
        "logging_dir",
        "metadata_thumbnail",
    }
)
"""Options that hold a path of one machine: the site's `[trainer]` may set them, a template may not."""

NAME_OPTIONS = frozenset({"dataset_options.caption_extension", "log_prefix", "log_tracker_name"})
"""Options that become a part of file names, which a slash would put into another folder."""

SECRET_OPTIONS: Mapping[str, type] = {
    "async_upload": bool,
    "huggingface_path_in_repo": str,
    "huggingface_repo_id": str,
    "huggingface_repo_type": str,
    "huggingface_repo_visibility": str,
    "huggingface_token": str,
    "log_tracker_config": str,
    "wandb_api_key": str,
}
"""Tokens, and what is sent where: the site's `[secrets]` alone may set them, and no file of a run holds them."""

UPLOADING_LOGS = ("wandb", "all")
"""Values of `log_with` that send logs away: the site's to say."""

OPTION_OF_DATASET_FILE: Mapping[str, str] = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}
"""Options of trainer.toml that have another name in dataset.toml."""
