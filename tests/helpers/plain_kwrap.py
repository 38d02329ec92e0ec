"""The real `kwrap`, from its door on, with the plain worker in place of a trainer."""

from __future__ import annotations

from plain_runs import plain_launch

import kohaku_wrap.__main__
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.starting import resume
from kohaku_wrap.training.starting.launch import Launch

begin_attempt = resume.begin_attempt


def begin_plain_attempt(plan: resume.ResumePlan) -> tuple[Attempt, Launch]:
    attempt, launch = begin_attempt(plan)
    return attempt, plain_launch(attempt, launch)


if __name__ == "__main__":
    resume.begin_attempt = begin_plain_attempt
    kohaku_wrap.__main__.main()
