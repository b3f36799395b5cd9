"""Single lines of csrc/cuda, changed so that a kernel is wrong: the tests on the emulated device must notice each.

All are compiled in at once and switched on one by one: `mutate` writes `mutated(7) ? new : old` in the place of an
expression, and an if in that of a statement. Add a line for each kind of mistake that a new kernel could make. What
changes no result and breaks no rule, such as a bank conflict or an order of summation, is no mutation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` becomes `new`, at the first place after the text `after`; the cases of `op` must notice."""

    op: str
    file: str
    old: str
    new: str
    why: str
    after: str = ""

    def __str__(self) -> str:
        return f"{self.file.partition('.')[0]}-{self.why.replace(' ', '-')}"

    def place(self, text: str) -> int:
        return text.index(self.old, text.index(self.after) + len(self.after))

    def switched(self, number: int) -> str:
        """Either, as C++ that chooses when it runs."""
        on = f"emulation::mutated({number})"
        if declared := re.fullmatch(r"\w+ (\w+)\S* = \{\};", self.old):  # a variable that nobody fills
            return f"{self.old} if ({on}) emulation::forget(&{declared[1]}, sizeof({declared[1]}));"
        if self.old.endswith(";"):
            return f"{{ if ({on}) {{ {self.new} }} else {{ {self.old} }} }}"
        return f"({on} ? ({self.new}) : ({self.old}))"


def mutate(file: str, text: str) -> str:
    """The source of a file of csrc/cuda with all its mutations, none of them switched on."""
    found = [(each.place(text), number, each) for number, each in enumerate(MUTATIONS) if each.file == file]
    for place, number, mutation in sorted(found, reverse=True):
        text = text[:place] + mutation.switched(number) + text[place + len(mutation.old) :]
    return text


def _no_barrier(op: str, file: str, why: str, after: str) -> Mutation:
    return Mutation(op, file, "__syncthreads();", ";", f"no barrier {why}", after)


_REDUCE = [
    Mutation("iic", "reduce.cuh", "step > 0", "step > 1", "a lane lost from a sum", "T group_sum(T value)"),
    Mutation("nt_xent", "reduce.cuh", "value > other", "value < other", "the smallest for the largest"),
    _no_barrier("iic", "reduce.cuh", "before scratch is written again", "value = group_sum<kWarp>(value);"),
    _no_barrier("augment", "reduce.cuh", "before scratch is read", "scratch[threadIdx.x / kWarp] = value;"),
    Mutation("iic", "reduce.cuh", "first + i < count", "first + i <= count", "one more than there are"),
    Mutation(
        *("augment", "reduce.cuh", "static_cast<int>(blockDim.x) / kWarp", "static_cast<int>(blockDim.x) / kWarp - 1"),
        "the last warp lost",
    ),
    Mutation("iic", "reduce.cuh", "col < num_cols", "col <= num_cols", "a column past the last", "present && "),
]
_IIC_SHARED = [
    Mutation("iic", "iic_batch.cuh", "row * kMax + col", "row * num_clusters + col", "a wrong stride", "out["),
    Mutation("iic", "iic_batch.cuh", "head * chunks * matrix_size", "head * matrix_size", "a wrong stride of heads"),
    Mutation("iic", "iic_batch.cuh", "entry > num_entries", "entry >= num_entries", "the number of pairs lost"),
]
_SMALL = [
    Mutation(
        *("iic", "iic_small.cuh", "r == 0 ? p[c] : probs[view][c][row] + p[c]", "probs[view][c][row] + p[c]"),
        "a sum that begins with nothing written",
    ),
    _no_barrier("iic", "iic_small.cuh", "before a tile is read", "small_softmax(batch, blockIdx.y"),
    _no_barrier("iic", "iic_small.cuh", "after a tile is read", "b[j].w;"),
    Mutation("iic", "iic_small.cuh", "float sums[4][4] = {};", "float sums[4][4];", "an uninitialised sum"),
    Mutation("iic", "iic_small.cuh", "row < kSmallRows", "row < kSmallRows - 4", "a lost tail of rows", "slice * 4; "),
    Mutation("iic", "iic_small.cuh", "first_j + k * kSide", "first_i + k * kSide", "rows for columns"),
    Mutation("iic", "iic_small.cuh", "if (r > 0) __syncthreads();", ";", "no barrier between repeats"),
    _no_barrier("iic", "iic_small.cuh", "before the matrix is read", "load_centred<kMax>"),
    Mutation(
        "iic", "iic_small.cuh", "if (r > 0) __syncthreads();", ";", "no barrier after a copy", "if (last) copy_out"
    ),
    Mutation("iic", "iic_small.cuh", "min(e * magic >> 16, last)", "e * magic >> 16", "rows past the batch"),
    Mutation("iic", "iic_small.cuh", "(65535 + k) / k", "65535 / k", "a division rounded down"),
    Mutation("iic", "iic_small.cuh", "row * (k | 1) + cluster", "row * k + cluster", "an even stride", "void each("),
]
_TILED = [
    _no_barrier("iic", "iic_tiled.cuh", "before the planes are read", "view == 0 ? 1 : batch.repeats, probs);"),
    _no_barrier("iic", "iic_tiled.cuh", "after the planes are read", "sums[n][e] += large[e] + small[e];"),
    Mutation("iic", "iic_tiled.cuh", "first_i + lane / 8 % 2 * 8", "first_i + lane / 16 * 8", "a swapped fragment"),
    Mutation("iic", "iic_tiled.cuh", "first_j + n * 8 >= k", "first_j + n * 8 >= k - 8", "a lost tail of clusters"),
    Mutation(
        *("iic", "iic_tiled.cuh", "multiply_planes<2>(large, small, a[step], b, step);"),
        *("multiply_planes<2>(large, small, a[step], b, 0);", "the first step twice"),
    ),
    Mutation("iic", "iic_tiled.cuh", "if (first > 0) __syncthreads();", ";", "no barrier between parts of the matrix"),
    _no_barrier("iic", "iic_tiled.cuh", "before the next tile", "[n][p][i % 2] = bits[i];"),
    _no_barrier("iic", "iic_tiled.cuh", "before the next repeat", "if (batch.repeats > 1) {"),
    _no_barrier("iic", "iic_tiled.cuh", "before the dots are read", "if (t == 0) dots"),
    Mutation("iic", "iic_tiled.cuh", "1 - first_view - v", "first_view + v", "the same view for the other"),
    Mutation("iic", "iic_tiled.cuh", "k % 2 == 0", "true", "a pair at an odd place"),
    Mutation("iic", "iic_tiled.cuh", "cluster + 1 < k", "true", "a value past the row"),
    Mutation("iic", "iic_tiled.cuh", "part < Part::kParts", "part < Part::kParts - 1", "a lost part of the dots"),
]
_TENSOR_CORE = [
    Mutation("iic", "tensor_core.cuh", "b[0]", "b[1]", "a register twice", "f32.bf16.bf16"),
    Mutation(
        "iic", "tensor_core.cuh", "second", "first", "a half twice", 'cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair)'
    ),
    Mutation("iic", "tensor_core.cuh", "planes[p] << 16", "planes[p] & 0xffff0000u", "the other half taken off"),
    Mutation("nt_xent", "tensor_core.cuh", "b[n].high", "b[n].low", "a cross term lost", "d[n], a.low, "),
    Mutation(
        "nt_xent", "tensor_core.cuh", 'asm volatile("cp.async.wait_all;" ::: "memory");', ";", "no wait for copies"
    ),
]
_INFORMATION = [
    _no_barrier("iic", "iic_information.cuh", "before the matrix is read", "matrix[i * stride + j] = values"),
    Mutation("iic", "iic_information.cuh", "cluster.sync();", ";", "no barrier of the cluster"),
    Mutation("iic", "iic_information.cuh", "cluster.barrier_wait();", ";", "no wait for the first block"),
    Mutation("iic", "iic_information.cuh", "gridDim.x * num_warps", "num_warps", "pieces counted twice", "piece += "),
    _no_barrier("iic", "iic_information.cuh", "before the column sums are read", "column_sums[part][lane] = sum;"),
    Mutation("iic", "iic_information.cuh", "0", "1", "a part lost", "total = row_sums[lane];\n  for (int other = "),
    Mutation("iic", "iic_information.cuh", "mirror[x][row]", "mirror[row][x]", "no mirror image", "own[each] + "),
    Mutation("iic", "iic_information.cuh", "tile < tiles", "tile < tiles - 1", "the last tile lost"),
]
_LIBRARY = [
    Mutation("iic", "iic_library.cuh", "row % num_samples", "row", "rows past those of the first view"),
    Mutation("iic", "iic_library.cuh", "row * gridDim.y + blockIdx.y", "row + blockIdx.y * num_rows", "heads first"),
]
_NT_XENT = [
    _no_barrier("nt_xent", "nt_xent_tile.cuh", "between warps that copy", "finish_copies();"),
    Mutation(
        "nt_xent", "nt_xent_tile.cuh", "index % 2 * Shape::kColumns", "0", "one buffer for two", "Shape::kRows + "
    ),
    Mutation(
        *("nt_xent", "nt_xent_tile.cuh", "smaller(first + row, problem.num_columns - 1)", "first + row"),
        "rows past the last",
    ),
    Mutation(
        "nt_xent", "nt_xent_tile.cuh", "other < end_row()", "other <= end_row()", "a positive past the rank's rows"
    ),
    Mutation("nt_xent", "nt_xent_tile.cuh", "lane / 8 % 2 * kHalf", "lane / 16 * kHalf", "a swapped fragment", "row_b"),
    Mutation("nt_xent", "nt_xent_tile.cuh", "meets(block_row - half)", "false", "positives above not looked for"),
    Mutation(
        "nt_xent", "nt_xent_tile.cuh", "mine < Shape::kColumns", "mine <= Shape::kColumns", "a copy past the factors"
    ),
    Mutation(
        *("nt_xent", "nt_xent_kernels.cuh", "column >= problem.num_columns", "false", "columns past the last"),
        "column == row || ",
    ),
    Mutation(
        *("nt_xent", "nt_xent_kernels.cuh", "group_max<4>(largest[m][h])", "group_max<2>(largest[m][h])"),
        "half of a group",
    ),
    Mutation("nt_xent", "nt_xent_kernels.cuh", "0", "1", "the first split lost", "row].x);\n  for (int split = "),
    Mutation(
        *("nt_xent", "nt_xent_kernels.cuh", "smaller(n * 8 + first + e, columns - 1)"),
        *("smaller(n * 8 + first + e, columns)", "a log-sum-exp past the last"),
    ),
    Mutation("nt_xent", "nt_xent_kernels.cuh", "w[2]", "w[1]", "a swapped fragment", "a[step][m].set(1, "),
    Mutation(
        "nt_xent", "nt_xent_kernels.cuh", "split < splits", "split < splits - 1", "the last split lost", "= size)"
    ),
    Mutation(
        *("nt_xent", "nt_xent_kernels.cuh", "sums[m][h] *= fast_exp2(largest[m][h] - top * scale);", ";"),
        "a sum not scaled anew",
    ),
    Mutation(
        *("nt_xent", "nt_xent_cuda.cu", "ceil_div(num_tiles, tiles_per_split)", "num_tiles / tiles_per_split"),
        "a lost split",
    ),
]
_VIEWS = [
    _no_barrier("augment", "augment_views.cuh", "between views", "row * task.image_stride;"),
    _no_barrier("augment", "augment_views.cuh", "before the parameters are read", "image = copy;"),
    _no_barrier("augment", "augment_views.cuh", "before the samples are read", "moved, p + kAffine};"),
    _no_barrier("augment", "augment_views.cuh", "between blur and blur", "size, size, weights, reach);"),
    _no_barrier("augment", "augment_views.cuh", "before the Gaussian is read", "weights[k] /= sum;"),
    _no_barrier("augment", "augment_views.cuh", "before neighbours are read", "if (!spatial) continue;"),
    Mutation("augment", "augment_views.cuh", "2 * size - 2 - i", "2 * size - 1 - i", "an index off by one"),
    Mutation(
        "augment", "augment_views.cuh", "column < width", "column <= width", "a column past the last", "column >= 0"
    ),
    Mutation("augment", "augment_views.cuh", "i < bytes / 16", "i < bytes / 16 - 1", "a lost tail of bytes"),
    Mutation(
        "augment", "augment_views.cuh", "(layout.planes >= 0 ? 0 : kChannels * pixels)", "0", "planes over planes"
    ),
    Mutation("augment", "augment_views.cuh", "i * kOut + c", "i * 3 + c", "a wrong stride of pixels"),
    Mutation("augment", "augment_cuda.cu", "(floats + 3) / 4 * 4", "floats / 4 * 4", "too little shared memory"),
]
_HOST = [
    Mutation("iic", "iic_cuda.cu", "ceil_div(tiles, tiles_per_block)", "tiles / tiles_per_block", "a lost chunk"),
    Mutation("iic", "iic_cuda.cu", "ceil_div(h * k * k + 1, 256)", "ceil_div(h * k * k, 256)", "a block too few"),
    Mutation("iic", "iic_cuda.cu", "k * (k | 1) + k", "k * (k | 1)", "too little shared memory"),
]

MUTATIONS = [
    *(_REDUCE + _IIC_SHARED + _SMALL + _TILED + _TENSOR_CORE + _INFORMATION + _LIBRARY + _NT_XENT + _VIEWS + _HOST)
]
