"""The kernel of kernels/streamed_linear.py, which says what the arguments are.

A program takes tiles of the weight, one after the other, and of each all columns, or one split of
them. Its warps share the columns (WARPS_K) and the tile's rows (WARPS_N). A thread loads 16 bytes
of codes of two rows at a time, AHEAD steps before it needs them, and the first before the kernel in
front has ended; no code goes through shared memory. As they lie in a thread they are what the
tensor cores' left operand is made of, with columns in an order of their own: of 64 columns that
four threads hold, 16 each,

    column      t1 t0 s1 s0 e1 e0        thread t, its step s, and which of four
    multiplied  s1 s0 e1 t1 t0 e0        (m16n8k16: e0 and e1 are its registers)

x, which lies in shared memory, is read in the same order. Words of four codes are loaded, since a
loop would carry each byte in a register of its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels import float8_jit, gated_mul, quantised_rows

_activate = gluon.jit(gated_mul.activate.fn)
_largest_of = gluon.jit(quantised_rows.largest_of.fn)
_magnitude_bits = gluon.jit(float8_jit.magnitude_bits.fn)
_to_code = gluon.jit(quantised_rows.to_code.fn)


def _text(body: str) -> gl.constexpr:
    """Of one word $4 → four numbers of 16 bits, which `body` leaves in u and v."""
    return gl.constexpr(
        "{\n.reg .b16 l, h;\n.reg .b32 t, u, v, one, less;\n"
        + body
        + "mov.b32 {$0, $1}, u;\nmov.b32 {$2, $3}, v;\n}"
    )


def _nibbles(shift: int, one: int, less: int, raise_: str) -> gl.constexpr:
    return _text(
        f"mov.b32 one, {one:#x};\nmov.b32 less, {less:#x};\n"
        f"shr.b32 t, $4, {shift};\nand.b32 t, t, 0x0F0F0F0F;\n{raise_}"
    )


_RAISE_BF16 = """prmt.b32 u, t, 0x43434343, 0x4140;
prmt.b32 v, t, 0x43434343, 0x4342;
fma.rn.bf16x2 u, u, one, less;
fma.rn.bf16x2 v, v, one, less;
"""
"""The byte n beside 0x43 is 128 + n, of which 136 is taken away."""
_RAISE_FP16 = """prmt.b32 u, t, 0x64646464, 0x4140;
prmt.b32 v, t, 0x64646464, 0x4342;
fma.rn.f16x2 u, u, one, less;
fma.rn.f16x2 v, v, one, less;
"""
"""The byte n beside 0x64 is 1024 + n, of which 1032 is taken away."""
_LOW_TO_BF16 = _nibbles(0, 0x3F803F80, 0xC308C308, _RAISE_BF16)
_HIGH_TO_BF16 = _nibbles(4, 0x3F803F80, 0xC308C308, _RAISE_BF16)
_LOW_TO_FP16 = _nibbles(0, 0x3C003C00, 0xE408E408, _RAISE_FP16)
_HIGH_TO_FP16 = _nibbles(4, 0x3C003C00, 0xE408E408, _RAISE_FP16)
_FLOAT8_TO_FP16 = _text(
    "mov.b32 {l, h}, $4;\ncvt.rn.f16x2.e4m3x2 u, l;\ncvt.rn.f16x2.e4m3x2 v, h;\n"
)


@gluon.jit(do_not_specialize=["rows"])
def streamed_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    norm_ptr,
    given_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrival_ptr,
    rows,
    size_n,
    num_tiles,
    scale_stride,
    group_stride,
    residual_stride,
    out_stride,
    eps,
    scale,
    WIDTH: gl.constexpr,
    NUM_GROUPS: gl.constexpr,
    GROUP: gl.constexpr,
    IS_PACKED: gl.constexpr,
    MOST: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STEP: gl.constexpr,
    SPLIT_K: gl.constexpr,
    WARPS_K: gl.constexpr,
    AHEAD: gl.constexpr,
    LOOPS: gl.constexpr,
    WORDS: gl.constexpr,
    ROWS: gl.constexpr,
    OPERAND: gl.constexpr,
    MMA: gl.constexpr,
    PDL: gl.constexpr,
):
    """BLOCK_N rows of the weight a tile, with an ACTIVATION half of them of the gate; BLOCK_M rows
    of x: one, 8 or 16. WIDTH: bytes of a row of the weight, of which a step takes WARPS_K · STEP.
    GROUP 0: a row has one scale. IS_PACKED: four bits a code; else it has 8, and x is made small.
    LOOPS: there are more tiles than programs.

    Layouts: WORDS of a step's codes, ROWS of x as they are stored to shared memory, OPERAND as they
    are loaded from it, MMA of sums."""
    CHUNK: gl.constexpr = WARPS_K * STEP
    SPAN: gl.constexpr = WIDTH // SPLIT_K
    STEPS: gl.constexpr = SPAN // CHUNK
    # Of packed codes a byte has columns k and k + K / 2.
    HALVES: gl.constexpr = 2 if IS_PACKED else 1
    PARTS: gl.constexpr = HALVES * STEPS
    HAS_OFFSET: gl.constexpr = offset_ptr is not None
    HAS_NORM: gl.constexpr = norm_ptr is not None
    IS_GATED: gl.constexpr = ACTIVATION is not None
    # Codes of 8 bits are numbers of 16 of any kind.
    number: gl.constexpr = x_ptr.dtype.element_ty if IS_PACKED else gl.float16
    program, split = gl.program_id(0), gl.program_id(1)
    first = split * SPAN
    # What is loaded of a step: words, and what scales them.
    word_row = gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    word_warp = gl.arange(0, WARPS_K, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    word = gl.arange(0, STEP // 4, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    word += word_warp * (STEP // 4)
    run_row = gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    warp = gl.arange(0, WARPS_K, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    ahead = _nothing()
    for step in gl.static_range(AHEAD):
        ahead = ahead + (
            _fetch(words_ptr, scale_ptr, offset_ptr, program, first + step * CHUNK, True, word_row,
                   word, run_row, warp, size_n, scale_stride, group_stride, WIDTH, NUM_GROUPS,
                   GROUP, IS_PACKED, HAS_OFFSET, IS_GATED, BLOCK_N, STEP),
        )  # fmt: skip
    of_n = _scale_of(scale_ptr, program, True, size_n, GROUP, IS_GATED, BLOCK_N, MMA)
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, ROWS))[None, :]
    gains = _nothing()
    if HAS_NORM:
        for part in gl.static_range(PARTS):
            k = first + part % STEPS * CHUNK + part // STEPS * WIDTH + column
            gains = gains + (gl.load(norm_ptr + k),)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    residual = _residual_of(
        residual_ptr, residual_stride, rows, program, True, BLOCK_M, BLOCK_N, MMA
    )
    numbers = gl.allocate_shared_memory(
        number, [PARTS, BLOCK_M, CHUNK], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    )
    # Sums of each warp's columns of a step.
    sums = gl.allocate_shared_memory(
        gl.float32, [PARTS, BLOCK_M, WARPS_K], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    m = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(1, ROWS)), rows - 1)[:, None]
    source = x_ptr + m * (HALVES * WIDTH) + first + column
    of_x = 1.0
    if not IS_PACKED:
        of_x = _store_codes(
            source, gains, given_ptr, numbers, eps, ROWS, BLOCK_M, CHUNK, STEPS, MOST, HAS_NORM
        )
    elif HAS_NORM or HAS_OFFSET:
        of_x = _store_numbers(
            source, gains, numbers, sums, eps, ROWS, WIDTH, BLOCK_M, CHUNK, WARPS_K, STEP, STEPS,
            HAS_NORM, HAS_OFFSET,
        )  # fmt: skip
    else:
        for part in gl.static_range(PARTS):
            async_copy.async_copy_global_to_shared(
                numbers.index(part), source + (part % STEPS * CHUNK + part // STEPS * WIDTH)
            )
        async_copy.commit_group()
        async_copy.wait_group(0)
        debug_barrier()
    if LOOPS:
        for tile in range(program, num_tiles, gl.num_programs(0)):
            ahead, of_n, residual = _multiply_tile(
                tile, split, ahead, of_n, of_x, residual, numbers, sums, words_ptr, scale_ptr,
                offset_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrival_ptr, word_row,
                word, run_row, warp, rows, size_n, num_tiles, scale_stride, group_stride,
                residual_stride, out_stride, scale, WIDTH, NUM_GROUPS, GROUP, IS_PACKED, ACTIVATION,
                BLOCK_M, BLOCK_N, STEP, SPLIT_K, WARPS_K, AHEAD, LOOPS, OPERAND, MMA,
            )  # fmt: skip
    else:
        _multiply_tile(
            program, split, ahead, of_n, of_x, residual, numbers, sums, words_ptr, scale_ptr,
            offset_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrival_ptr, word_row, word,
            run_row, warp, rows, size_n, num_tiles, scale_stride, group_stride, residual_stride,
            out_stride, scale, WIDTH, NUM_GROUPS, GROUP, IS_PACKED, ACTIVATION, BLOCK_M, BLOCK_N,
            STEP, SPLIT_K, WARPS_K, AHEAD, LOOPS, OPERAND, MMA,
        )  # fmt: skip


@gluon.jit
def _nothing():
    """What tensors are added to: a tuple that holds them."""
    return ()


@gluon.jit
def _multiply_tile(
    tile, split, ahead, of_n, of_x, residual, numbers, sums, words_ptr, scale_ptr, offset_ptr,
    bias_ptr, residual_ptr, out_ptr, partial_ptr, arrival_ptr, word_row, word, run_row, warp, rows,
    size_n, num_tiles, scale_stride, group_stride, residual_stride, out_stride, scale,
    WIDTH: gl.constexpr, NUM_GROUPS: gl.constexpr, GROUP: gl.constexpr, IS_PACKED: gl.constexpr,
    ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STEP: gl.constexpr,
    SPLIT_K: gl.constexpr, WARPS_K: gl.constexpr, AHEAD: gl.constexpr, LOOPS: gl.constexpr,
    OPERAND: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """A tile's sums, delivered, or this split's part of them. `ahead`: what `_fetch` has given for
    its first steps; of_n, residual: of its rows; → those of the program's next tile."""
    COLUMNS: gl.constexpr = 8 if BLOCK_M == 1 else BLOCK_M
    CHUNK: gl.constexpr = WARPS_K * STEP
    STEPS: gl.constexpr = WIDTH // SPLIT_K // CHUNK
    HAS_OFFSET: gl.constexpr = offset_ptr is not None
    IS_GATED: gl.constexpr = ACTIVATION is not None
    SUM: gl.constexpr = gl.SliceLayout(0, MMA)
    TILE: gl.constexpr = BLOCK_N * COLUMNS
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    first = split * (STEPS * CHUNK)
    next_tile = tile + gl.num_programs(0)
    next_of_n, next_residual = of_n, residual
    if LOOPS:
        is_next = next_tile < num_tiles
        next_of_n = _scale_of(scale_ptr, next_tile, is_next, size_n, GROUP, IS_GATED, BLOCK_N, MMA)
        next_residual = _residual_of(
            residual_ptr, residual_stride, rows, next_tile, is_next, BLOCK_M, BLOCK_N, MMA
        )
    acc = gl.full([WARPS_K, BLOCK_N, COLUMNS], 0.0, gl.float32, MMA)
    for turn in range(STEPS // AHEAD):
        step = turn * AHEAD
        # Of this tile, or of the next one, if there is one.
        is_beyond = step + AHEAD >= STEPS
        then = gl.where(is_beyond, next_tile, tile)
        is_there = then < num_tiles if LOOPS else not is_beyond
        at = first + gl.where(is_beyond, step + AHEAD - STEPS, step + AHEAD) * CHUNK
        fetched = _nothing()
        for turned in gl.static_range(AHEAD):
            words, of_low, of_high, to_low, to_high = ahead[turned]
            acc = _add_product(
                acc, words, numbers, sums, step + turned, of_low, to_low, False, MMA, OPERAND,
                IS_PACKED, GROUP, HAS_OFFSET, BLOCK_M, BLOCK_N, WARPS_K, STEP,
            )  # fmt: skip
            if IS_PACKED:
                acc = _add_product(
                    acc, words, numbers, sums, STEPS + step + turned, of_high, to_high, True, MMA,
                    OPERAND, IS_PACKED, GROUP, HAS_OFFSET, BLOCK_M, BLOCK_N, WARPS_K, STEP,
                )  # fmt: skip
            if LOOPS or STEPS > AHEAD:
                fetched = fetched + (
                    _fetch(words_ptr, scale_ptr, offset_ptr, then, at + turned * CHUNK, is_there,
                           word_row, word, run_row, warp, size_n, scale_stride, group_stride,
                           WIDTH, NUM_GROUPS, GROUP, IS_PACKED, HAS_OFFSET, IS_GATED, BLOCK_N,
                           STEP),
                )  # fmt: skip
        if LOOPS or STEPS > AHEAD:
            ahead = fetched
    result = gl.sum(acc, 0)
    n_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUM))[:, None]
    m = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUM))[None, :]
    is_last = True
    if SPLIT_K > 1:
        # The last to arrive adds up what all have stored, in the order of the splits.
        partials = partial_ptr + tile * TILE + n_row * COLUMNS + m
        gl.store(partials + split * num_tiles * TILE, result)
        # All threads have stored before one of them says so.
        debug_barrier()
        is_last = gl.atomic_add(arrival_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if is_last:
            gl.store(arrival_ptr + tile, 0)
            result = gl.full([BLOCK_N, COLUMNS], 0.0, gl.float32, SUM)
            for _ in gl.static_range(SPLIT_K):
                # Past the L1 cache, which does not see what other processors store.
                result += gl.load(partials, cache_modifier=".cg")
                partials += num_tiles * TILE
    if is_last:
        result *= of_n * of_x
        if IS_GATED:
            pairs = result.reshape([BLOCK_N // 16, 2, 8, COLUMNS]).permute(0, 2, 3, 1)
            gate, up = gl.split(pairs.reshape([BLOCK_N // 2, COLUMNS, 2]))
            gated = _activate(gate, ACTIVATION) * up
            HALF: gl.constexpr = gated.type.layout
            gated_n = gl.arange(0, BLOCK_N // 2, gl.SliceLayout(1, HALF))[:, None]
            gated_n += tile * (BLOCK_N // 2)
            gated_m = gl.arange(0, COLUMNS, gl.SliceLayout(0, HALF))[None, :]
            out = out_ptr + gated_m * out_stride + gated_n
            gl.store(out, gated.to(dtype), mask=gated_m < rows)
        else:
            n = tile * BLOCK_N + n_row
            if bias_ptr is not None:
                result += gl.load(bias_ptr + n).to(gl.float32)
            if scale is not None:
                result *= scale
            result += residual
            gl.store(out_ptr + m * out_stride + n, result.to(dtype), mask=m < rows)
    return ahead, next_of_n, next_residual


@gluon.jit
def _scale_of(
    scale_ptr, tile, is_there, size_n, GROUP: gl.constexpr, IS_GATED: gl.constexpr,
    BLOCK_N: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Of a tile's rows, if each has one; of what is not there, anything."""
    if GROUP:
        return 1.0
    else:
        row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(0, MMA)))[:, None]
        n = _row_of(tile, row, size_n, BLOCK_N, IS_GATED)
        return gl.load(scale_ptr + n, mask=(row >= 0) & is_there)


@gluon.jit
def _residual_of(
    residual_ptr, residual_stride, rows, tile, is_there, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """What is added to a tile's results; of what is not there, anything."""
    if residual_ptr is None:
        return 0.0
    else:
        COLUMNS: gl.constexpr = 8 if BLOCK_M == 1 else BLOCK_M
        m = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(0, MMA)))[None, :]
        n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(0, MMA)))[:, None]
        at = residual_ptr + m * residual_stride + (tile * BLOCK_N + n)
        return gl.load(at, mask=(m < rows) & is_there).to(gl.float32)


@gluon.jit
def _row_of(tile, row, size_n, BLOCK_N: gl.constexpr, IS_GATED: gl.constexpr):
    """Of the weight. With a gate, 8 of its rows and the 8 of up that they meet are neighbours: a
    thread has both."""
    if IS_GATED:
        at = tile * (BLOCK_N // 2) + row // 16 * 8 + row % 8
        return gl.where(row // 8 % 2 == 1, at + size_n, at)
    else:
        return tile * BLOCK_N + row


@gluon.jit
def _fetch(
    words_ptr, scale_ptr, offset_ptr, tile, at, is_there, word_row, word, run_row, warp, size_n,
    scale_stride, group_stride, WIDTH: gl.constexpr, NUM_GROUPS: gl.constexpr, GROUP: gl.constexpr,
    IS_PACKED: gl.constexpr, HAS_OFFSET: gl.constexpr, IS_GATED: gl.constexpr,
    BLOCK_N: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """A step's words, from byte `at` of the rows, and scales and offsets of lower and upper halves;
    of what is not there, anything."""
    n = _row_of(tile, word_row, size_n, BLOCK_N, IS_GATED).to(gl.int64)
    source = words_ptr + n * (WIDTH // 4) + (at // 4 + word)
    words = gl.load(source, mask=(word_row >= 0) & is_there, eviction_policy="evict_first")
    # What a kernel does without is something that is loaded anyway.
    of_low, of_high, to_low, to_high = words, words, words, words
    if GROUP:
        n = _row_of(tile, run_row, size_n, BLOCK_N, IS_GATED)
        low = n * scale_stride + (at + warp * STEP) // GROUP * group_stride
        high = low + NUM_GROUPS // 2 * group_stride
        mask = (run_row >= 0) & is_there
        of_low = gl.load(scale_ptr + low, mask=mask)
        of_high = gl.load(scale_ptr + high, mask=mask)
        if HAS_OFFSET:
            to_low = gl.load(offset_ptr + low, mask=mask)
            to_high = gl.load(offset_ptr + high, mask=mask)
    return words, of_low, of_high, to_low, to_high


@gluon.jit
def _store_codes(
    source, gains, given_ptr, numbers, eps, ROWS: gl.constexpr, BLOCK_M: gl.constexpr,
    CHUNK: gl.constexpr, STEPS: gl.constexpr, MOST: gl.constexpr, HAS_NORM: gl.constexpr,
):  # fmt: skip
    """The codes of one row into `numbers`; → what they are multiplied by to be norm(x)."""
    squares = gl.full([BLOCK_M, CHUNK], 0.0, gl.float32, ROWS)
    largest = gl.full([BLOCK_M, CHUNK], 0, gl.int32, ROWS)
    loaded = _nothing()
    for part in gl.static_range(STEPS):
        loaded = loaded + (gl.load(source + part * CHUNK),)
    for part in gl.static_range(STEPS):
        x = loaded[part].to(gl.float32)
        if HAS_NORM:
            squares += x * x
            x *= gains[part].to(gl.float32)
        largest = gl.maximum(largest, _magnitude_bits(x))
    factor = 1.0
    if HAS_NORM:
        factor = gl.rsqrt(gl.sum(gl.sum(squares, 1), 0) / (STEPS * CHUNK) + eps)
    # What x, with the norm's weight, is multiplied by to be codes; what its codes, to be a norm's.
    of_row = _largest_of(gl.max(gl.max(largest, 1), 0))
    if given_ptr is None:
        inverse = MOST / of_row
        of_codes = of_row / MOST * factor
    else:
        given = gl.load(given_ptr)
        inverse = factor / given
        of_codes = gl.where(of_row == of_row, given, of_row)
    for part in gl.static_range(STEPS):
        # A long row is loaded twice, rather than kept in registers.
        x = (gl.load(source + part * CHUNK) if STEPS > 8 else loaded[part]).to(gl.float32)
        if HAS_NORM:
            x *= gains[part].to(gl.float32)
        numbers.index(part).store(_to_code(x * inverse, MOST, True, True).to(gl.float16))
    return of_codes


@gluon.jit
def _store_numbers(
    source, gains, numbers, sums, eps, ROWS: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr, CHUNK: gl.constexpr, WARPS_K: gl.constexpr, STEP: gl.constexpr,
    STEPS: gl.constexpr, HAS_NORM: gl.constexpr, HAS_OFFSET: gl.constexpr,
):  # fmt: skip
    """x, multiplied by the norm's weight, into `numbers`, and its sums; → what is left of the norm,
    which is that of one row, all of whose columns are here."""
    squares = gl.full([BLOCK_M, CHUNK], 0.0, gl.float32, ROWS)
    for part in gl.static_range(2 * STEPS):
        x = gl.load(source + (part % STEPS * CHUNK + part // STEPS * WIDTH))
        if HAS_NORM:
            wide = x.to(gl.float32)
            squares += wide * wide
            x = (wide * gains[part].to(gl.float32)).to(x.dtype)
        numbers.index(part).store(x)
        if HAS_OFFSET:
            runs = x.to(gl.float32).reshape([BLOCK_M, WARPS_K, STEP])
            sums.index(part).store(gl.sum(runs, 2))
    if HAS_NORM:
        return gl.rsqrt(gl.sum(gl.sum(squares, 1), 0) / (2 * WIDTH) + eps)
    else:
        return 1.0


@gluon.jit
def _add_product(
    acc, words, numbers, sums, part, of_run, to_run, IS_HIGH: gl.constexpr, MMA: gl.constexpr,
    OPERAND: gl.constexpr, IS_PACKED: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSET: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS_K: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """acc + codes · x of a step, scaled if a row has several scales, with offset · sums of x."""
    left = _left(words, IS_HIGH, numbers.dtype, MMA, IS_PACKED, BLOCK_N, WARPS_K, STEP)
    right = _right(numbers.index(part).load(OPERAND), MMA, BLOCK_M, WARPS_K, STEP)
    if GROUP == 0:
        return mma_v2(left, right, acc)
    else:
        product = mma_v2(left, right, gl.zeros_like(acc)) * of_run
        if HAS_OFFSET:
            of_columns = sums.index(part).permute([1, 0]).load(gl.SliceLayout(1, MMA))
            product += to_run * gl.expand_dims(of_columns, 1)
        return acc + product


@gluon.jit
def _left(
    words, IS_HIGH: gl.constexpr, number: gl.constexpr, MMA: gl.constexpr, IS_PACKED: gl.constexpr,
    BLOCK_N: gl.constexpr, WARPS_K: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Codes as the tensor cores' left operand, [WARPS_K, BLOCK_N, STEP]."""
    if number == gl.bfloat16:
        a, b, c, d = gl.inline_asm_elementwise(
            _HIGH_TO_BF16 if IS_HIGH else _LOW_TO_BF16, "=h,=h,=h,=h,r", [words],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        of_nibbles: gl.constexpr = _HIGH_TO_FP16 if IS_HIGH else _LOW_TO_FP16
        a, b, c, d = gl.inline_asm_elementwise(
            of_nibbles if IS_PACKED else _FLOAT8_TO_FP16, "=h,=h,=h,=h,r", [words],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    codes = gl.join(gl.join(a, b), gl.join(c, d))
    # 64s, t, s, e0, e1 → 64s, s, e1, t, e0
    codes = codes.reshape([WARPS_K, BLOCK_N, STEP // 64, 4, 4, 2, 2])
    codes = codes.permute(0, 1, 2, 4, 6, 3, 5).reshape([WARPS_K, BLOCK_N, STEP])
    return gl.convert_layout(codes, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _right(x, MMA: gl.constexpr, BLOCK_M: gl.constexpr, WARPS_K: gl.constexpr, STEP: gl.constexpr):
    """x [BLOCK_M, WARPS_K · STEP] as the right operand, [WARPS_K, STEP, BLOCK_M]; one row eight
    times."""
    layout: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    # 64s, t, s, e1, e0 → 64s, s, e1, t, e0
    x = x.reshape([BLOCK_M, WARPS_K, STEP // 64, 4, 4, 2, 2])
    x = x.permute(1, 2, 4, 5, 3, 6, 0).reshape([WARPS_K, STEP, BLOCK_M])
    x = gl.convert_layout(x, layout, assert_trivial=True)
    if BLOCK_M == 1:
        x, _ = gl.broadcast(x, gl.full([WARPS_K, STEP, 8], 0.0, x.dtype, layout))
    return x
