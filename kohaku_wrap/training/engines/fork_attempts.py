"""Attempts of the sd-scripts worker from one process that imported the trainer once: a fork each.

Reads one JSON document a line on stdin, `{"folder", "environment", "arguments", "log"}`, and answers each with
`{"exit_code"}`. The imports take longer than a small training; the census makes some hundred of these.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from importlib import import_module

from kohaku_wrap.trainer.checkout import find_checkout, require_supported
from kohaku_wrap.trainer.corrections import correct_loop
from kohaku_wrap.training.engines.sd_scripts import worker as sd_scripts

IMPORTED_BY_ATTEMPTS = (
    "sdxl_train_network",
    "lycoris.kohya",
    "networks.lora",
    "ftfy",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "diffusers.models.autoencoders.autoencoder_kl",
    "kohaku_wrap.training.engines.sd_scripts.run",
)
"""What every training would import by itself, the slowest ones."""


def main() -> int:
    """Import the trainer, then one attempt after another until stdin ends."""
    # What the trainer prints at its import is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    checkout = require_supported(find_checkout())
    correct_loop(checkout.path, checkout.name)
    sd_scripts.enter_checkout(checkout)
    for name in IMPORTED_BY_ATTEMPTS:
        import_module(name)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            run_attempt(asked)
        _, status = os.waitpid(child, 0)
        answers.write(json.dumps({"exit_code": os.waitstatus_to_exitcode(status)}) + "\n")
        answers.flush()
    return 0


def run_attempt(asked: dict[str, object]) -> None:
    """The worker's main in this fork, which ends with it."""
    code = 1
    try:
        log = os.open(str(asked["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= dict(asked["environment"])  # type: ignore[call-overload]  # a JSON object of strings
        os.chdir(str(asked["folder"]))
        sys.argv = ["sd_scripts", *map(str, asked["arguments"])]  # type: ignore[call-overload]  # a JSON list
        code = sd_scripts.main()
    except BaseException as error:
        # The worker's own hook writes down why the attempt failed.
        sys.excepthook(type(error), error, error.__traceback__)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
