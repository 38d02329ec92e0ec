"""How `accelerate launch` joins machines, from its own parser, printed as one JSON document.

Run as `python -m kohaku_wrap.planning.workers.list_launch_options launch`. `options` are those that say how machines
find each other, `others` the names of all the rest.
"""

from __future__ import annotations

import contextlib
import json
import sys

from accelerate.commands.launch import launch_command_parser

from kohaku_wrap.planning.workers.list_options import describe_action

GROUP = "Distributed GPUs"
"""accelerate's own heading."""


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        parser = launch_command_parser()
    joining = [group for group in parser._action_groups if group.title == GROUP]
    actions = {action.dest: action for action in parser._actions}
    names = {action.dest for group in joining for action in group._group_actions} | {"num_machines"}
    document = {
        "options": {name: describe_action(actions[name]) for name in sorted(names)},
        "others": sorted(set(actions) - names),
    }
    json.dump(document, sys.stdout)


if __name__ == "__main__":
    main()
