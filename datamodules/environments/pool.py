"""Environments in processes of their own, with limits of time and memory.

Checkers are other people's code that reads what a model wrote: they raise, loop for ever and eat memory. In a process
beside the trainer that costs one sample a failure with a name. It also keeps their imports out of the trainer
(reasoning-gym brings matplotlib). A process that is late is killed and replaced; all end with their parent, even by
kill -9: one that waits sees its pipe close, one that works has an alarm of the system.
"""

import math
import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pkgutil import resolve_name
from types import TracebackType
from typing import Any

from datamodules.conversations.messages import read_messages
from datamodules.environments.draws import available, draw
from datamodules.text.workers import begin_worker
from modules.batch import Conversational, Environment, Judgement, Message, Problem, Worked
from modules.errors import UserError

Definition = Mapping[str, Any]
"""`class_path` of an environment and `init_args`, as in a run file."""

START_SECONDS = 300.0
"""What a process may need to import and build an environment, on a busy machine."""
DRAW_SECONDS = 120.0
"""What a job of drawing problems may take."""
DRAWN_TOGETHER = 32
"""Problems of such a job: one at a time would cost more to send than to make."""
GRACE = 2.0
"""Seconds after which the system ends a process that is late, where its parent does not."""
_OPENED = "opened"
"""What `_Worker.finish` returns when the environment is built and its job has begun."""


@dataclass(frozen=True)
class _Failure:
    """What a job failed with."""

    reason: str
    mistake: bool = False
    """Whether a UserError said it."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    name: str
    action: str
    arguments: tuple[Any, ...]
    seconds: float


class Pool:
    """Draws problems and judges replies; a context manager. Processes start when they are needed.

    Args:
        definitions: environments by name.
        processes: number of processes.
        seconds: what a judgement, or the environment's next turn, may take.
        gigabytes: memory of a process (Linux).

    Raises:
        UserError: a definition is none.
    """

    def __init__(
        self, definitions: Mapping[str, Definition], processes: int = 1, seconds: float = 10.0, gigabytes: float = 4.0
    ) -> None:
        self.definitions = {name: check(name, definition) for name, definition in definitions.items()}
        self._processes, self._seconds, self._bytes = processes, seconds, int(gigabytes * 2**30)
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self.close()

    def close(self) -> None:
        """End the processes; the next job starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def problems(self, name: str, seed: int, numbers: Sequence[int], held_out: bool) -> list[Problem]:
        """Return the problems of numbers, see `draw`; for training `rows` gives their solutions too.

        Raises:
            UserError: one cannot be drawn.
        """
        return [problem for problem, _ in self._drawn(name, seed, numbers, held_out, solved=False)]

    def rows(self, name: str, seed: int, numbers: Sequence[int]) -> Iterator[tuple[Problem, Message]]:
        """Yield the training problems of numbers, never a held-out one, with solutions.

        Raises:
            UserError: one cannot be drawn, or the environment has no solutions.
        """
        yield from self._drawn(name, seed, numbers, held_out=False, solved=True)

    def available(self, name: str, held_out: bool) -> int | None:
        """Return how many different problems one side has; None: without end."""
        return self._sure(_Job(name=name, action="available", arguments=(held_out,), seconds=DRAW_SECONDS))

    def is_conversational(self, name: str) -> bool:
        """Return whether an environment may go on after the model's turn."""
        return self._sure(_Job(name=name, action="is_conversational", arguments=(), seconds=DRAW_SECONDS))

    def judge(self, name: str, replies: Sequence[tuple[Problem, str]]) -> list[Judgement]:
        """Judge replies; a checker that raises, is late or dies gives a judgement with a `failure`."""
        jobs = [_Job(name=name, action="judge", arguments=pair, seconds=self._seconds) for pair in replies]
        return [_judged(found) for found in self._run(jobs)]

    def respond(self, name: str, dialogues: Sequence[tuple[Problem, list[Message]]]) -> list[list[Message] | Judgement]:
        """Return the turns that follow each dialogue, none where it ends; where that fails, what it is judged."""
        jobs = [_Job(name=name, action="respond", arguments=pair, seconds=self._seconds) for pair in dialogues]
        return [_judged(found) for found in self._run(jobs)]

    def solutions(self, name: str, problems: Sequence[Problem]) -> list[Message] | None:
        """Return the environment's own answers, None if it has none.

        Raises:
            UserError: one cannot be made.
        """
        jobs = [_Job(name=name, action="solution", arguments=(p,), seconds=DRAW_SECONDS) for p in problems]
        found = [self._checked(name, result) for result in self._run(jobs)]
        return None if None in found else found

    def _drawn(
        self, name: str, seed: int, numbers: Sequence[int], held_out: bool, solved: bool
    ) -> Iterator[tuple[Problem, Message]]:
        parts = [numbers[start : start + DRAWN_TOGETHER] for start in range(0, len(numbers), DRAWN_TOGETHER)]
        jobs = [
            _Job(name=name, action="draw", arguments=(seed, list(part), held_out, solved), seconds=DRAW_SECONDS)
            for part in parts
        ]
        for found in self._run(jobs):
            yield from self._checked(name, found)

    def _sure(self, job: _Job) -> Any:
        return self._checked(job.name, next(iter(self._run([job]))))

    def _checked(self, name: str, found: Any) -> Any:
        if isinstance(found, _Failure):
            raise UserError(f"environments.{name}: {found.reason}")
        return found

    def _run(self, jobs: Iterable[_Job]) -> Iterator[Any]:
        """Yield what jobs return, or their failures, in their order."""
        todo = deque(enumerate(jobs))
        done: dict[int, Any] = {}
        busy: dict[_Worker, int] = {}
        wanted = 0
        while len(self._workers) < min(self._processes, len(todo)):
            self._workers.append(_Worker(self.definitions, self._bytes))
        idle = list(self._workers)
        try:
            while todo or busy:
                while todo and idle:
                    worker = idle.pop()
                    busy[worker], job = todo.popleft()
                    worker.begin(job)
                for worker in _ready(busy):
                    if (found := worker.finish()) is not _OPENED:
                        done[busy.pop(worker)] = found
                        idle.append(worker)
                while wanted in done:
                    yield done.pop(wanted)
                    wanted += 1
        finally:
            for worker in busy:  # whoever asked has gone
                worker.kill()


class _Worker:
    """A process that does one job at a time; one that fails in its own way is replaced by the next job."""

    def __init__(self, definitions: Mapping[str, Definition], memory: int) -> None:
        self._definitions, self._memory = definitions, memory
        self._process: Any = None
        self._job: _Job | None = None
        self._opened: set[str] = set()
        self.connection: Connection
        self.deadline = 0.0
        self._start()

    def begin(self, job: _Job) -> None:
        """Hand over a job; the first of an environment builds it, which has a time of its own."""
        self._job = job
        if self._process is None:
            self._start()
        seconds = job.seconds if job.name in self._opened else START_SECONDS
        self.deadline = time.monotonic() + seconds
        self.connection.send(job if job.name in self._opened else (job.name, self._definitions[job.name]))

    def finish(self) -> Any:
        """Return the result of the job, its failure or `_OPENED`; the process has sent something, or is late."""
        job = self._job
        assert job is not None
        if not self.connection.poll():
            self.kill()
            return _Failure(f"took longer than {job.seconds:g} s")
        try:
            found = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.kill()
            return _Failure(f"the process ended ({_exit(code)})")
        if job.name not in self._opened and not isinstance(found, _Failure):
            self._opened.add(job.name)
            self.begin(job)
            return _OPENED
        if isinstance(found, _Failure) and found.reason.startswith("MemoryError"):
            self.kill()
        return found

    def kill(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.connection.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._memory), daemon=True)
        with _fixed_hashes():
            self._process.start()
        theirs.close()
        self._opened = set()


@contextmanager
def _fixed_hashes() -> Iterator[None]:
    """Let processes that are started have the same hashes: generators that go through sets make the same problems."""
    key, before = "PYTHONHASHSEED", os.environ.get("PYTHONHASHSEED")
    os.environ[key] = "0"
    try:
        yield
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})


def check(name: str, definition: Any) -> Definition:
    """Return the definition of an environment.

    Raises:
        UserError: it has not the form of one.
    """
    shape = {"class_path": str, "init_args": dict}
    known = isinstance(definition, Mapping) and "class_path" in definition and definition.keys() <= shape.keys()
    if not known or not all(isinstance(value, shape[key]) for key, value in definition.items()):
        example = "{class_path: datamodules.environments.reasoning_gym.ReasoningGym, init_args: {family: chain_sum}}"
        raise UserError(f"environments.{name}: takes class_path and init_args, for example {example}")
    return definition


def _ready(busy: Iterable[_Worker]) -> list[_Worker]:
    """Wait until a process has sent something, has ended or is late, and return those."""
    late = min(worker.deadline for worker in busy) - time.monotonic()
    sent = wait([worker.connection for worker in busy], max(late, 0))
    now = time.monotonic()
    return [worker for worker in busy if worker.connection in sent or worker.deadline <= now]


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}" + (", out of memory?" if code == -signal.SIGKILL else "")
    return f"exit code {code}"


def _work(connection: Connection, memory: int) -> None:
    """Do jobs until the parent closes the pipe; what environments print goes nowhere."""
    begin_worker()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    environments: dict[str, Environment] = {}
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        seconds = job.seconds if isinstance(job, _Job) else START_SECONDS
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)  # its default action needs no Python to run
        found = _do(job, environments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(found)
        except OSError:  # the parent has gone
            return


def _do(job: "_Job | tuple[str, Definition]", environments: dict[str, Environment]) -> Any:
    """Return the result of a job; whatever it raises is its failure."""
    try:
        if isinstance(job, _Job):
            return _act(environments[job.name], job.action, job.arguments)
        name, definition = job
        environments[name] = resolve_name(definition["class_path"])(**definition.get("init_args", {}))
        return None
    except UserError as error:
        return _Failure(str(error), mistake=True)
    except BaseException as error:  # SystemExit too
        return _Failure(f"{type(error).__name__}: {error}"[:300])


def _judged(found: Any) -> Any:
    """Return what a job returned, for its failure a judgement that says so."""
    if isinstance(found, _Failure):
        return Judgement(reward=0.0, reason="not judged", failure=found.reason)
    return found


def _act(environment: Environment, action: str, arguments: tuple[Any, ...]) -> Any:
    """Return what an environment says, after a look at its form: whoever asked relies on it."""
    if action == "draw":
        seed, numbers, held_out, solved = arguments
        problems = [_check_problem(draw(environment, seed, number, held_out)) for number in numbers]
        if not solved:
            return [(problem, None) for problem in problems]
        if not isinstance(environment, Worked):
            raise UserError(f"{type(environment).__name__} has no worked solutions to train on")
        return [(problem, environment.solution(problem)) for problem in problems]
    if action == "available":
        return available(environment, *arguments)
    if action == "is_conversational":
        return isinstance(environment, Conversational)
    if action == "solution":
        return environment.solution(*arguments) if isinstance(environment, Worked) else None
    if action == "judge":
        return _check_judgement(environment.judge(*arguments))
    assert action == "respond"
    assert isinstance(environment, Conversational)
    return _check_turns(environment.respond(*arguments))


def _check_problem(problem: Problem) -> Problem:
    read_messages(problem.messages)
    if not isinstance(problem.answer, str):
        raise TypeError(f"the answer of a problem must be a text, not {problem.answer!r:.80}")
    return problem


def _check_turns(turns: list[Message]) -> list[Message]:
    for turn in turns if isinstance(turns, list) else [turns]:
        told = isinstance(turn, dict) and turn.get("role") in ("user", "tool")
        if not told or not isinstance(turn.get("content"), str):
            raise TypeError(f"respond returned {turns!r:.80}, no list of turns of a user or tool with their content")
    return turns


def _check_judgement(judgement: Judgement) -> Judgement:
    if not isinstance(judgement, Judgement):
        raise TypeError(f"judge returned {judgement!r:.80}, no Judgement")
    if not isinstance(judgement.reward, int | float) or not math.isfinite(judgement.reward):
        raise ValueError(f"judge gave the reward {judgement.reward!r:.80}, no finite number")
    return judgement
