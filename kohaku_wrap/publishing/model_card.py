"""The model card of a published run, in the form that model sites read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kohaku_wrap.merging.hashes import AUTO_V2_DIGITS, FileHashes

TRAINING_VALUES = (
    "optimizer_type", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "min_snr_gamma", "noise_offset",
    "mixed_precision", "save_precision", "max_token_length", "max_grad_norm", "loss_type", "seed",
)  # fmt: skip
DATASET_VALUES = (
    "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "shuffle_caption",
    "keep_tokens_separator", "caption_tag_dropout_rate",
)  # fmt: skip
NETWORK_VALUES = ("network_dim", "network_alpha")
MARKDOWN_MARKS = frozenset("*\\<[`|{")
LICENSES_BY_NAME = frozenset(
    (
        "apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "cc0-1.0",
        "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "agpl-3.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0",
        "unlicense", "wtfpl", "other", "unknown",
    )
)  # fmt: skip
PROMPT_NOTE = "Brackets in tags are written `\\(` and `\\)` in webui-style front ends."


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells."""

    name: str
    """The run's."""

    optimizer_step: int | None
    """None for the end of the run."""

    lock: Mapping[str, Any]
    """run.lock.toml."""

    lineage: Sequence[Mapping[str, Any]]
    """The attempts, oldest first."""

    hashes: Mapping[str, FileHashes]
    """The published models by file name."""

    ledger_sha256: str
    """Empty if there is no ledger."""

    license: str
    """Empty if it is not known."""

    base_name: str
    """The file name of the base model."""


def list_values(table: Mapping[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """Lines of a Markdown table for what is set."""
    chosen = names if names is not None else sorted(table)
    return [f"| {name} | {show_value(table[name])} |" for name in chosen if table.get(name) not in (None, "", [], {})]


def show_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(show_value(item) for item in value)
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
    # Markdown would read patterns as emphasis and as escapes.
    return f"`{text}`".replace("|", "\\|") if set(text) & MARKDOWN_MARKS else text


def table_of(title: str, lines: Sequence[str], heads: str = "| what | value |\n|---|---|") -> str:
    return f"## {title}\n\n{heads}\n" + "\n".join(lines) + "\n" if lines else ""


def lineage_lines(lineage: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each attempt: from which step, on what, and how it ended."""
    lines = []
    for entry in lineage:
        attempt, end = entry.get("attempt", {}), entry.get("end") or entry.get("result") or {}
        ended = end.get("kind") or end.get("outcome") or "not recorded"
        step = end.get("optimizer_step")
        reached = f"{ended} at optimizer step {step:,}" if isinstance(step, int) else ended
        lines.append(
            f"| {entry.get('number')} | {attempt.get('start_optimizer_step', '?')} | {attempt.get('processes', '?')} | "
            f"{attempt.get('accumulation', '?')} | {reached} |"
        )
    return lines


def front_matter(facts: CardFacts) -> str:
    """The YAML head that model sites read; JSON strings are YAML strings.

    Hugging Face takes its own short names as a license, and another one as `other` with a name in small letters.
    """
    short = re.sub(r"[^a-z0-9.+]+", "-", facts.license.lower()).strip("-")
    named = [f"license: {short or 'unknown'}"]
    if short and short not in LICENSES_BY_NAME:
        named = ["license: other", f"license_name: {json.dumps(short)}"]
    tags = ["stable-diffusion-xl", "lycoris", str(facts.lock.get("network_args", {}).get("algo", "lora")), "kwrap"]
    lines = ["---", *named, "language: [en]", "pipeline_tag: text-to-image"]
    return "\n".join([*lines, f"tags: {json.dumps(tags, ensure_ascii=False)}", "---", ""])


def compose_card(facts: CardFacts) -> str:
    """The card as Markdown; the same facts give the same text."""
    lock = facts.lock
    run, plan = lock.get("run", {}), lock.get("plan", {})
    total = plan.get("total_optimizer_steps")
    step = facts.optimizer_step if facts.optimizer_step is not None else total
    at = f"optimizer step {step:,} of {total:,}" if isinstance(step, int) and isinstance(total, int) else "the end"
    # Options stand as one types them, and only counts are grouped: 1,024, 1,024 is no resolution.
    counts = {name: f"{value:,}" if isinstance(value, int) else value for name, value in plan.items()}
    inputs = lock.get("inputs", {})
    name = inputs.get("captions_dataset") or run.get("dataset")
    dataset = f", dataset `{name}`" if name else ""
    base = f"`{facts.base_name}`" if facts.base_name else "a base model"
    if inputs.get("base_model_sha256"):
        base += f" (AutoV2 {inputs['base_model_sha256'][:AUTO_V2_DIGITS]})"
    if "network_sha256" in inputs:
        digits = inputs["network_sha256"][:AUTO_V2_DIGITS]
        base += f", trained on from `{inputs.get('network_name', 'a network')}` (AutoV2 {digits})"
    parts = [
        front_matter(facts),
        f"# {facts.name}\n\nThe network and the model at {at}, trained with kwrap {run.get('kwrap_version', '')} "
        f"from the template `{run.get('template', '')}`{dataset}, on {base}.\n",
        table_of(
            "Files",
            [
                f"| {file} | {hashes.auto_v2} | `{hashes.sha256}` | `{hashes.data_sha256}` |"
                for file, hashes in facts.hashes.items()
            ],
            "| file | AutoV2 | sha256 | sshs_model_hash, of the data (AutoV3) |\n|---|---|---|---|",
        ),
        table_of(
            "Dataset",
            list_values({"images in an epoch, repeats counted": counts.get("images")})
            + list_values(counts, ("batches", "epochs"))
            + list_values(lock.get("dataset", {}), DATASET_VALUES)
            + list_values(inputs, ("selection_sha256", "captions_digest")),
        ),
        table_of(
            "Training",
            list_values(run, ("engine", "effective_batch"))
            + list_values(
                {f"trainer_{name}": lock.get("trainer", {}).get(name) or None for name in ("commit", "support")}
            )
            + list_values(counts, ("optimizer_steps_per_epoch", "total_optimizer_steps"))
            + list_values(lock.get("values", {}), TRAINING_VALUES)
            + list_values(lock.get("optimizer_args", {})),
        ),
        table_of(
            "Network",
            list_values(lock.get("values", {}), NETWORK_VALUES)
            + list_values(lock.get("network_args", {}))
            + list_values(lock.get("preset", {})),
        ),
        table_of(
            "Attempts",
            lineage_lines(facts.lineage),
            "| attempt | from optimizer step | processes | accumulation | end |\n|---|---|---|---|---|",
        ),
        prompt_text(inputs.get("prompt_format", "")),
        proof_text(facts),
        f"## License\n\n{facts.license or 'Not stated: neither the base model nor the publisher names one.'}\n",
    ]
    return "\n".join(part for part in parts if part)


def prompt_text(prompt_format: str) -> str:
    """How to write prompts, as the captions were."""
    if not prompt_format:
        return "## Prompts\n\nThe captions came with the images, kwrap did not write them: write prompts as they are.\n"
    return f"## Prompts\n\n```\n{prompt_format}\n```\n\n{PROMPT_NOTE}\n"


def proof_text(facts: CardFacts) -> str:
    """What lets others check that the run is what the card says."""
    if not facts.ledger_sha256:
        return "## Ledger\n\nThe run kept no ledger.\n"
    return (
        "## Ledger\n\nThe run's ledger tells for every micro-batch what was trained. Its digest, the sha256 over the "
        f"names, sizes and bytes of its files in the order of their names:\n\n`{facts.ledger_sha256}`\n"
    )
