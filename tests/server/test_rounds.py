"""What saves rounds of the event loop: tasks that go on at once, timers that share one, wake-ups that are merged."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine.engine import loop as engine_loop
from pyengine.server.app import application
from pyengine.server.models import Models
from pyengine.server.rounds import delays, Turn


def test_a_task_goes_on_within_the_call_that_settles_what_it_waits_for() -> None:
    async def main() -> list[Any]:
        loop, said = asyncio.get_running_loop(), list[Any]()
        turns = [Turn(loop=loop) for _ in range(3)]

        async def waits(turn: Turn) -> None:
            try:
                said.append(await turn)
            except ValueError as error:
                said.append(str(error))

        def settle() -> None:
            turns[0].settle("a")
            said.append("then")
            turns[1].settle(error=ValueError("b"))
            turns[1].settle("never")

        tasks = [asyncio.create_task(waits(t)) for t in turns]
        loop.call_later(0.01, settle)
        await asyncio.wait(tasks[:2])
        turns[2].settle("from a task")                       # which is not interrupted
        said.append("first")
        await tasks[2]
        ready = Turn(loop=loop)
        ready.settle("there already")
        said.append(await ready)
        return said

    assert asyncio.run(main()) == ["a", "then", "b", "first", "from a task", "there already"]


def test_a_task_that_is_cancelled_while_it_waits_ends() -> None:
    async def main() -> bool:
        turn = Turn(loop=asyncio.get_running_loop())

        async def waits() -> None:
            await turn

        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        turn.settle("nobody waits")
        return turn.cancelled()

    assert asyncio.run(main())


def test_delayed_calls_come_in_time_by_one_timer_unless_they_are_taken_back() -> None:
    async def main() -> tuple[list[Any], int]:
        loop = asyncio.get_running_loop()
        later, said, timers = delays(loop), list[Any](), list[float]()
        plain = loop.call_at
        loop.call_at = lambda at, *rest, **more: (timers.append(at), plain(at, *rest, **more))[1]      # type: ignore[method-assign]
        loop.set_exception_handler(lambda _, context: said.append(type(context["exception"])))
        due = [later.later(0.05, lambda i=i: said.append(i)) for i in range(100)]
        for d in due[1:98]:
            d.cancel()
        later.later(0.05, lambda: 1 // 0)
        later.later(0.05, lambda: (said.append("again"), later.later(0.05, lambda: said.append("end")))[0])
        later.later(0.01, lambda: said.append("soon"))
        before = len(timers)
        await asyncio.sleep(0.3)
        assert delays(loop) is later
        return said, before

    said, n_timers = asyncio.run(main())
    assert said == ["soon", 0, 98, 99, ZeroDivisionError, "again", "end"] and n_timers == 2


def test_wake_ups_of_one_event_loop_are_merged_and_those_of_a_closed_one_forgotten() -> None:
    wakes, closed = engine_loop._Wakes(), asyncio.new_event_loop()
    wakes.add([(closed, lambda: None)])                      # it is closed before it wakes up
    closed.close()
    said = list[str]()

    def a() -> None:
        said.append("a")

    async def main() -> int:
        loop, n = asyncio.get_running_loop(), 0
        plain = loop.call_soon_threadsafe

        def counted(*args: Any, **more: Any) -> Any:
            nonlocal n
            n += 1
            return plain(*args, **more)

        loop.call_soon_threadsafe = counted                  # type: ignore[method-assign]
        wakes.add([(loop, a), (loop, lambda: said.append("b")), (closed, a)])
        wakes.add([(loop, a), (loop, lambda: said.append("c"))])
        await asyncio.sleep(0.01)
        wakes.add([(loop, a)])
        await asyncio.sleep(0.01)
        return n

    assert asyncio.run(main()) == 2 and said == ["a", "b", "c", "a"] and not wakes._calls


@pytest.mark.parametrize("peer, header, seen", [("127.0.0.1", b"10.1.2.3", "10.1.2.3"), ("10.9.9.9", b"10.1.2.3", "10.9.9.9"),
                                                 ("127.0.0.1", b"10.7.7.7, 127.0.0.1", "10.7.7.7")])
def test_a_proxy_of_this_machine_says_for_whom_it_asks_and_others_do_not(peer: str, header: bytes, seen: str) -> None:
    app = application(Models())
    scope = {"type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "query_string": b"", "http_version": "1.1", "scheme": "http",
             "root_path": "", "headers": [(b"host", b"localhost"), (b"x-forwarded-for", header)], "client": (peer, 1), "server": ("localhost", 80)}
    sent = list[Any]()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(SimpleNamespace(**message))

    asyncio.run(app(scope, receive, send))
    assert sent[0].status == 200 and scope["client"][0] == seen
