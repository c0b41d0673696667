"""Small steps without a graph of vLLM's: what is launched is captured in one when such a step comes again.

They have prompts, or requests verify different numbers of drafts: vLLM then has graphs without attention
(``PIECEWISE``), and lets each layer launch its kernels one by one. For a few new tokens, as after a prefix hit, that
takes the host longer than the GPU. But what kernels are launched with follows from addresses, shapes and numbers that
the host knows; lengths and blocks they read on the device. So the launches of two steps are the same where a layer is
given the same of all these.

Steps are made to come again (:func:`alike`): vLLM pads the tokens to the size of its graphs, whose results lie where
they lay before; what the host knows of lengths is rounded up; and the few tensors that are made for a step are put
where those of others were. A graph is found by everything that its launches were given, so that an address or a number
that has changed finds none.
"""

from __future__ import annotations

import bisect
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.layer import Layer
from logquant_vllm.core.paged import Batch, PagedCache
from logquant_vllm.core.parts import Part, Parts
from logquant_vllm.core.past import PastSlice

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

MOST_GRAPHS = 1024
"""Of some layers. On an H200 one took 0.1 to 0.2 MiB, which vLLM knows nothing of."""
LONG_AGO = 10_000
"""Steps after which a form that has not come again makes room for others, as one does that came only once."""
FEW_ROWS = 4096
"""The past of a step is gathered by launches for so many tokens, or for as many as the workspace holds."""
MOST_SLICES = 8
"""Of the past of a step."""

_Key = tuple[Any, ...]


def key_of(x: Any) -> Any:
    """Addresses, shapes and numbers of tensors, and of tuples of such."""
    if isinstance(x, Tensor):
        return x.data_ptr(), x.dtype, x.shape, x.stride()
    if isinstance(x, slice):
        return x.start, x.stop
    return tuple([key_of(member) for member in x]) if isinstance(x, tuple | list) else x


class Launches(NamedTuple):
    """What launches were given, of a layer or of a whole step, and the graph of them if they have come again."""

    given: _Key
    kept: tuple[Any, ...]  # the same objects, with their tensors, which nobody gives back meanwhile
    graph: Captured | None = None
    before: Captured | None = None  # the graph of others, which may still run

    def equal(self, other: Launches) -> bool:
        """Whether a graph of the one is one of the other."""
        return self.given == other.given and [*map(id, self.kept)] == [*map(id, other.kept)]


class Captured:
    """A graph, and the results that each replay writes anew."""

    def __init__(self, graph: Any, results: Any) -> None:
        self._graph, self._results = graph, results

    def replay(self) -> Any:
        """Launch it; the results."""
        self._graph.replay()
        return self._results


class Form:
    """Steps of one description: by layer, or of the model, what was launched the last time."""

    def __init__(self) -> None:
        self.used = 0  # in which step
        self._launches: dict[Any, Launches] = {}

    @property
    def has_graphs(self) -> bool:
        """Whether such steps are replayed, or were."""
        return any(launches.graph or launches.before for launches in self._launches.values())

    def run(self, whose: Any, launches: Launches, launch: Callable[[], Any], capture: Callable[..., Any]) -> Any:
        """``launch``, or its graph if ``whose`` launches are those of the last time; its results."""
        last = self._launches.get(whose)
        if last is None or not last.equal(launches):
            before = last and (last.graph or last.before)
            self._launches[whose] = launches._replace(before=before)
            return launch()
        graph = last.graph
        if graph is None and (graph := capture(launch)) is not None:
            self._launches[whose] = launches._replace(graph=graph)
        return launch() if graph is None else graph.replay()


class Again:
    """A step, described as others are described, too.

    Args:
        batch, parts: with padding: ``num_tokens`` in all. Without parts, in which requests have rows of their own, the
            batch has rows of padding, too.
    """

    def __init__(self, num_tokens: int, batch: Batch, parts: Parts | None, form: Form, graphs: Graphs) -> None:
        self.num_tokens, self.batch, self.parts = num_tokens, batch, parts
        self.form, self.graphs = form, graphs
        self.is_captured = False
        """Now, as a whole, so that no layer is captured or replayed by itself."""
        self._workspace = 0
        self._tables: tuple[Tensor, Tensor] | None = None

    def step(
        self,
        whose: Any,
        step: Callable[..., None],
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: PagedCache,
        output: Tensor,
    ) -> None:
        """The step of a layer: launched the first time, then captured, then replayed.

        Args:
            whose: the layer, hashable.
            step: ``kernels.operations.step``, which takes the rest.
        """
        if self.parts is None:
            if self._tables is None:  # the same for all layers, too
                rows = self.batch.seq_lens.shape[0]
                self._tables = with_rows(cache.block_table, rows), with_rows(cache.window_block_table, rows)
            cache = PagedCache(cache.pages, cache.window, *self._tables)

        def launch() -> None:
            if self._is_padding_read:
                self.graphs.clear_padding(value, self.batch)
            step(layer, query, key, value, cache, self.batch, output, self.parts)

        if self.is_captured:
            return launch()
        memory = cache.pages, cache.window, cache.window_block_table, self.workspace(layer)
        given = key_of((query, key, value, output, *memory))
        self.form.run(whose, Launches(given, (layer,)), launch, self.graphs.capture)

    def workspace(self, layer: Layer) -> int:
        """The address of attention's workspace, the same for all layers of a step."""
        if not self._workspace:
            self._workspace = layer.dense.memory(self.batch.seq_lens.device, ((1,), torch.uint8))[0].data_ptr()
        return self._workspace

    @property
    def _is_padding_read(self) -> bool:
        """Whether FlashAttention reads new values where they are, as it does unless they are gathered behind a past."""
        if self.parts is None:
            return False
        _, continued, begun = self.parts
        return begun is not None or (continued is not None and not (continued.past and continued.past.whole))


class Graphs:
    """The forms of the steps of some layers.

    Args:
        layers: how many.
        sizes: numbers of tokens that vLLM has graphs for.
        max_num_seqs, max_model_len: of the server.
        may_capture: whether the workspace of attention stays where it is from now on.
    """

    def __init__(
        self,
        layers: int,
        sizes: Sequence[int],
        max_num_seqs: int,
        max_model_len: int,
        may_capture: Callable[[], bool],
        device: torch.device,
    ) -> None:
        self._sizes, self._longest, self._may_capture = sorted(sizes), max_model_len, may_capture
        self._most_forms, self._most_reqs = max(MOST_GRAPHS // layers, 1), max_num_seqs
        self._steps = 0
        self._forms: dict[_Key, Form] = {}  # in the order of their use
        # of each slice, and the first rows of two parts; each begins at a multiple of 16 bytes, or Triton would compile
        # kernels anew
        self._made = torch.zeros(MOST_SLICES + 2, -(-(max_num_seqs + 1) // 4) * 4, dtype=torch.int32, device=device)
        self._rows = torch.arange(max(sizes, default=0), dtype=torch.int32, device=device)
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self.captures_whole = True
        """Whether no step failed to be captured as a whole."""
        self._first: Any = None  # graph: torch captures into no pool whose graphs are all thrown away

    def again(self, num_tokens: int, batch: Batch, block_table: Tensor, parts: Parts | None, room: int) -> Again | None:
        """The description of a step under which it may come again, if it is a small one.

        Args:
            batch, block_table, parts: of the step as it is. No parts: all requests verify drafts, or decode.
            room: tokens of the past that the workspace holds.
        """
        index = bisect.bisect_left(self._sizes, num_tokens)
        past = parts and parts.continued and parts.continued.past
        if index == len(self._sizes) or (past and len(past.slices) > MOST_SLICES) or not self._may_capture():
            return None
        size, places = self._sizes[index], iter(self._made)
        of_vllm = {x.untyped_storage().data_ptr() for x in (batch.query_start_loc, batch.seq_lens)}

        def keep(x: Tensor) -> Tensor:
            return x if x.untyped_storage().data_ptr() in of_vllm else next(places)[: x.shape[0]].copy_(x)

        batch = batch._replace(max_seq_len=self._longest)
        if parts is None:
            batch = padded(batch, self._most_reqs, next(places), next(places))
            block_table = with_rows(block_table, batch.seq_lens.shape[0])
        else:
            batch, parts = batch._replace(max_query_len=size), alike(parts, size, room, self._longest, keep)
        form = self._form(key_of((size, batch, block_table, parts)))
        return None if form is None else Again(size, batch, parts, form, self)

    def _form(self, key: _Key) -> Form | None:
        """Of a description, if there is room for it."""
        self._steps += 1
        form = self._forms.pop(key, None)
        if form is None and len(self._forms) >= self._most_forms:
            old = self._steps - LONG_AGO
            idle = next((k for k, x in self._forms.items() if x.used < old or not x.has_graphs), None)
            if idle is None:
                return None
            del self._forms[idle]
        form = self._forms[key] = form or Form()  # behind all others
        form.used = self._steps
        return form

    def clear_padding(self, value: Tensor, batch: Batch) -> None:
        """Zero in rows of padding: attention kernels read some, and mask weights, but a NaN times 0 is still one."""
        is_padding = self._rows[: value.shape[0]] >= batch.query_start_loc[-1]
        value.masked_fill_(is_padding[:, None, None], 0)

    def capture(self, launch: Callable[[], Any], is_whole: bool = False) -> Captured | None:
        """A graph of what ``launch`` does, or None if that fails: then nothing of the kind is captured any more.

        Args:
            is_whole: a step, where anything may fail: kernels of other projects may ask for what they need of a stream
                that they do not know. Layers are captured one by one then.
        """
        if not (self.captures_whole if is_whole else self._sizes):  # it failed for another layer of this step
            return None
        try:
            return self._capture(launch)
        except Exception as error:
            if not (is_whole or isinstance(error, RuntimeError)):
                raise
            cause = error.__context__ or error  # what ended the capture, not that it has ended
            if is_whole:
                self.captures_whole = False
                logger.warning("LogQuant: short prompts are replayed layer by layer: capturing all failed: %r", cause)
            else:
                self._sizes = []
                logger.warning("LogQuant: short prompts take the host longer, as capturing them failed: %r", cause)
            return None

    def _capture(self, launch: Callable[[], Any]) -> Captured:
        # no graph has results that are read after the next one, so all share memory
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._made.device)
        torch.cuda.synchronize()  # a graph that this one replaces is thrown away
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), _no_garbage_collected():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = launch()
            except BaseException:
                if self._first is None:  # the only graph in the pool
                    self._pool = None
                raise
            finally:
                graph.capture_end()
        self._first = self._first or graph
        return Captured(graph, results)


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Somebody's graph that is thrown away meanwhile would end what is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def padded(batch: Batch, most: int, starts: Tensor, lens: Tensor) -> Batch:
    """A batch with rows of padding, without a token, behind its requests: to a power of two, as kernels' shares do not
    depend on those.

    Args:
        most: rows of all tables.
        starts, lens: where its tensors are put, int32 ``[most + 1]``.
    """
    count = batch.seq_lens.shape[0]
    rows = min(1 << (count - 1).bit_length(), most)
    starts, lens = starts[: rows + 1], lens[:rows]
    starts[: count + 1] = batch.query_start_loc
    starts[count + 1 :] = batch.query_start_loc[-1:]
    lens[:count] = batch.seq_lens
    lens[count:] = 0
    return batch._replace(query_start_loc=starts, seq_lens=lens)


def with_rows(table: Tensor, rows: int) -> Tensor:
    """So many rows of a block table of which the first are given: vLLM's has one for every request of the server."""
    columns, distance = table.shape[1], table.stride(0)
    end = table.storage_offset() + (rows - 1) * distance + columns
    if end * table.itemsize > table.untyped_storage().nbytes():  # one that was made for this step
        return torch.nn.functional.pad(table, (0, 0, 0, rows - table.shape[0]))
    return table.as_strided((rows, columns), table.stride())


def alike(parts: Parts, num_tokens: int, room: int, max_model_len: int, keep: Callable[[Tensor], Tensor]) -> Parts:
    """The parts of a step with all that the host knows of lengths rounded up, and padding behind the last token.

    Args:
        num_tokens: with padding.
        room: tokens of the past that the workspace holds.
        keep: puts a tensor where that of another step was.
    """

    def rounded(piece: PastSlice) -> PastSlice:
        rows = FEW_ROWS if piece.rows <= FEW_ROWS <= room else room
        return PastSlice(piece.first, min(rows, max_model_len), rows, keep(piece.start_loc))

    def part(x: Part | None) -> Part | None:
        if x is None:
            return None
        longest = x.batch.max_query_len if x is parts.decoding else num_tokens
        batch = Batch(keep(x.batch.query_start_loc), keep(x.batch.seq_lens), longest, max_model_len)
        tokens = slice(x.tokens.start, num_tokens) if x is last else x.tokens
        return Part(tokens, x.first_request, batch, x.past and x.past._replace(slices=[*map(rounded, x.past.slices)]))

    last = parts.begun or parts.continued or parts.decoding
    return Parts(*map(part, parts))
