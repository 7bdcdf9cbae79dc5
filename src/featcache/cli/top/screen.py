"""The application in the terminal: the frame, the keys, and a line to type a filter in."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, ClassVar, Final

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Input

from featcache import FeatcacheError, KeyView
from featcache.cli.exits import Exit
from featcache.cli.top.frame import draw, map_cells
from featcache.cli.top.look import Look
from featcache.cli.top.model import VIEWS, Model, View
from featcache.cli.top.short import plain
from featcache.cli.top.watch import Watch, clock

_PAGE: Final = 10
_TICK_S: Final = 1.0
INTERRUPTED: Final = 130


class Frame(Widget):
    """The frame, drawn as large as there is room."""

    def __init__(self, model: Model, look: Look) -> None:
        super().__init__()
        self.model = model
        self.look = look

    def render(self) -> Text:
        """Draw the frame."""
        width, height = self.size
        lines = draw(self.model, self.look, width, height, clock())
        return Text("\n", no_wrap=True).join(lines)


class Top(App[int | FeatcacheError]):
    """Shows a model, which a `Watch` keeps up to date; ends with an exit code, or an error."""

    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None  # the line to type in takes keys only while it is shown
    CSS = """
    Screen { background: ansi_default; color: ansi_default; layout: vertical; overflow: hidden; }
    Frame { height: 1fr; background: ansi_default; color: ansi_default; }
    Input { display: none; height: 1; border: none; padding: 0; background: ansi_default;
            color: ansi_default; }
    Input:focus { border: none; background: ansi_default; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "leave(130)", priority=True),
        Binding("ctrl+z", "suspend_process", priority=True),
        Binding("q", "leave(0)"),
        *(Binding(str(at), f"choose('{view}')") for at, view in enumerate(VIEWS, 1)),
        Binding("tab", "next_view(1)", priority=True),
        Binding("shift+tab", "next_view(-1)", priority=True),
        Binding("s", "sort"),
        Binding("r", "reverse"),
        Binding("slash", "filter"),
        Binding("space,f", "freeze"),
        Binding("m", "letters"),
        Binding("e", "evict"),
        Binding("y", "answer(True)"),
        Binding("n", "answer(False)"),
        Binding("question_mark,h", "help"),
        Binding("escape", "escape"),
        Binding("down,j", "move(1)"),
        Binding("up,k", "move(-1)"),
        Binding("pagedown", f"move({_PAGE})"),
        Binding("pageup", f"move({-_PAGE})"),
        Binding("home", "move(-1000000)"),
        Binding("end", "move(1000000)"),
        Binding("ctrl+l", "repaint"),
    ]

    def __init__(self, model: Model, look: Look) -> None:
        super().__init__(ansi_color=True)  # the terminal's own colours, where there are any
        self.model = model
        self.frame = Frame(model, look)
        self.looker = Watch(model, self._cells, self.frame.refresh)
        self._tasks: set[asyncio.Task[None]] = set()

    def compose(self) -> ComposeResult:
        """Return the widgets."""
        yield self.frame
        yield Input(placeholder="rows with this text alone; Enter keeps it, Esc ends it")

    def on_mount(self) -> None:
        """Begin to look."""
        self._begin(self._looking())
        self.set_interval(_TICK_S, self._tick)

    async def on_unmount(self) -> None:
        """End looking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _looking(self) -> None:
        try:
            await self.looker.run()
        except FeatcacheError as error:
            self.exit(error)

    def _cells(self) -> int:
        return map_cells(*self.frame.size)

    def _tick(self) -> None:
        """Draw anew where the frame tells how long something has lasted."""
        if self.model.changes_by_itself(clock()):
            self.frame.refresh()

    def stop(self, code: int) -> None:
        """End with an exit code; the terminal is as it was."""
        self.exit(code)

    # --- keys -------------------------------------------------------------------------------------

    def action_leave(self, code: int) -> None:
        """End."""
        self.exit(code)

    def action_choose(self, view: View) -> None:
        """Show a table."""
        self.model.choose(view)
        self._chosen()

    def action_next_view(self, step: int) -> None:
        """Show the next table."""
        self.model.next_view(step)
        self._chosen()

    def action_sort(self) -> None:
        """Go by the next order."""
        self.model.sort()
        self._chosen()

    def _chosen(self) -> None:
        if self.model.view == "keys" and not self.model.frozen:
            self.looker.wake()  # only the owner has them, and in each order others
        self.frame.refresh()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self.model.reverse()
        self.frame.refresh()

    def action_freeze(self) -> None:
        """Freeze the frame, or let it follow again."""
        self.model.frozen = not self.model.frozen
        self.looker.wake()
        self.frame.refresh()

    def action_letters(self) -> None:
        """Draw the map with letters, or with colours again."""
        self.frame.look = self.frame.look.other()
        self.frame.refresh()

    def action_help(self) -> None:
        """Show what the keys do."""
        self.model.helping = not self.model.helping
        self.frame.refresh()

    def action_escape(self) -> None:
        """Leave what is open: a question, the help, a filter."""
        self.model.escape(clock())
        self.frame.refresh()

    def action_move(self, step: int) -> None:
        """Move the cursor."""
        self.model.move(step)
        self.frame.refresh()

    def action_repaint(self) -> None:
        """Draw everything anew."""
        self.refresh(layout=True)

    def action_evict(self) -> None:
        """Ask whether to evict the key under the cursor."""
        self.model.ask(clock())
        self._chosen()

    def action_answer(self, yes: bool) -> None:
        """Answer a question; it is asked twice."""
        key = self.model.answer(yes, clock())
        if key is not None:
            self._begin(self._evict(key))
        self.frame.refresh()

    async def _evict(self, one: KeyView) -> None:
        label = plain(one.label)
        try:
            found = await self.looker.evict(one.key)
            text = f"{label} is evicted" if found else f"{label} was gone already"
        except FeatcacheError as error:
            text = f"{label} is not evicted: {error}"
        self.model.say(text, clock())
        self.looker.wake()
        self.frame.refresh()

    # --- the filter -------------------------------------------------------------------------------

    def action_filter(self) -> None:
        """Type a filter."""
        line = self.query_one(Input)
        line.value = self.model.filtered
        line.display = True
        line.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as it is typed."""
        if event.input.display:
            self.model.filter(event.value)
            self.frame.refresh()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter."""
        self._close_filter(event.input)

    def on_key(self, event: events.Key) -> None:
        """End the filter, while it is typed."""
        line = self.query_one(Input)
        if event.key == "escape" and line.display:
            self.model.filter("")
            self._close_filter(line)
            event.stop()
            event.prevent_default()

    def _close_filter(self, line: Input) -> None:
        line.display = False
        self.set_focus(None)
        self.frame.refresh()


def run(model: Model, look: Look) -> int:
    """Show a model in this terminal until it is left; return the exit code, or raise the error.

    Whatever ends it, the terminal is as it was: its keys, its cursor, what stood on it.
    """
    return asyncio.run(_run(model, look))


async def _run(model: Model, look: Look) -> int:
    app = Top(model, look)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, app.stop, 128 + number)
    ended = await app.run_async(mouse=False)
    if isinstance(ended, FeatcacheError):
        raise ended
    return Exit.FAILED if ended is None else ended
