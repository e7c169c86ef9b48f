"""Worker processes: started, ended with their parent, and stopped by signals."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import ParamSpec, TypeVar

from megatron.config.errors import StopRequested

P = ParamSpec("P")
T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def exit_with_parent() -> None:
    """In a worker process: end when the process that started it has ended, even by SIGKILL.

    A worker whose parent was killed would wait for its next task for ever.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _begin_worker() -> None:
    exit_with_parent()
    # Documents are many and form no cycles: looking for cycles among them at every 700th costs and finds nothing.
    gc.set_threshold(100_000, 50, 50)


class _Pool(ProcessPoolExecutor):
    """Starts its processes with the stop signals blocked, so that not even one that is still starting hears them."""

    def submit(self, task: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().submit(task, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class InProcess(Executor):
    """Does each task when it is submitted, in this process."""

    def submit(self, task: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def workers_started(workers: int) -> Iterator[Executor]:
    """A pool of spawned processes, or this process where one is enough. Signals are for this process to handle.

    Left by an error or a signal, the processes are killed at once: parts that were being written are made again.
    """
    if workers == 1:
        yield InProcess()
        return
    before = set(multiprocessing.active_children())
    # Spawned, not forked: the tokenizer libraries run threads of their own, which do not survive a fork.
    pool = _Pool(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    except BaseException:
        _kill(set(multiprocessing.active_children()) - before)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def signals_stop() -> Iterator[None]:
    """While entered, Ctrl-C, SIGTERM and SIGUSR1 raise StopRequested in the main thread, once; later ones are ignored.

    In any other thread it does nothing: Python handles signals in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise StopRequested(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # after a stop the process is ending: an echo of the signal must not change its exit code
            signal.signal(number, signal.SIG_IGN if asked else handler)


def _kill(processes: set[BaseProcess]) -> None:
    for process in processes:
        process.kill()
