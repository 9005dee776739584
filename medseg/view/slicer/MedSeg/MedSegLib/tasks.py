"""Questions to medseg whose answers are waited for without stopping Slicer's window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from MedSegLib.command import CommandError, Run, State

#: What is called with the answer, and what with the sentence of an error.
Then = Callable[[str], None]


class Task:
    """A command, what is done with what it prints, and what was said of it last."""

    def __init__(
        self,
        run: Run,
        then: Then,
        failed: Then,
        seen: Callable[[State], None] | None,
        *,
        answers_anyway: bool,
    ) -> None:
        self.run = run
        self._answers_anyway = answers_anyway
        self._then, self._failed, self._seen = then, failed, seen

    def look(self) -> bool:
        """See how far it is; whether it has ended, and what follows was called."""
        at_work = self.run.running
        state = self.run.look()
        if self._seen is not None:
            self._seen(state)
        if at_work:
            return False
        try:
            self.run.finish(answers_anyway=self._answers_anyway)
        except CommandError as error:
            self._failed(str(error))
        else:
            self._then(self.run.output)
        return True


class Tasks:
    """Commands at work. Something calls `look` from time to time."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        then: Then,
        failed: Then,
        seen: Callable[[State], None] | None = None,
        environment: Mapping[str, str] | None = None,
        answers_anyway: bool = False,
        patience_s: float | None = None,
    ) -> None:
        """Start a command under a name. The one of that name that is at work is of no interest any
        more: it is stopped, and nothing is called for it. Raises `CommandError`.

        answers_anyway: as of `Run.finish`; patience_s: as of `Run`.
        """
        self.drop(name)
        self._tasks[name] = Task(
            Run(arguments, environment, patience_s=patience_s),
            then,
            failed,
            seen,
            answers_anyway=answers_anyway,
        )

    def drop(self, name: str) -> None:
        """Stop the one of this name, if it is at work, and want nothing of it."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.run.cancel()

    def cancel(self, name: str) -> None:
        """Tell the one of this name to stop; what follows is called as for an error."""
        if name in self._tasks:
            self._tasks[name].run.cancel()

    def at_work(self, name: str) -> bool:
        """Whether the one of this name has not ended."""
        return name in self._tasks

    def look(self) -> None:
        """See how far all are."""
        for name, task in list(self._tasks.items()):
            ended = task.look()
            if ended and self._tasks.get(name) is task:
                del self._tasks[name]

    def abandon(self) -> None:
        """Stop all, and want nothing of them."""
        for name in list(self._tasks):
            self.drop(name)
