// out = a b, or out += a b, for fp32, bf16 and fp16 in any mixture: the products and their sums are
// fp32, a 16-bit result is rounded once.
//
// Three steps, for some depth (columns of a, rows of b) at a time: the operand with fewer rows
// (columns) is packed into memory of the caller that all threads share, groups of the other one into
// memory of the thread that takes them, and tiles of the result stay in registers. What packing and
// tiles look like is a matter of the instruction set: see Tiles.
#pragma once

#include <cstdint>

#include "cpu/rows/rows.h"

namespace dak {

// Element [i, j] is data[i * row + j * column].
struct Matrix {
  const void* data;
  Type type;
  int64_t row, column;
};

struct Gemm {
  int64_t m, n, inner;
  Matrix a, b;  // [m, inner] and [inner, n]
  void* out;    // [m, n], neighbours in a row side by side, rows `out_row` apart
  Type out_type;
  int64_t out_row;
  bool add;
};

// Lines (rows of a, columns of b) to be packed: element k of line i is data[i * line + k * step].
// A panel holds the first number of `width` lines, then the second of each, and so on; zeros stand
// for lines that are not there.
struct Lines {
  const void* data;
  Type type;
  int64_t line, step, lines, inner;
};

// One tile of the result, `rows` x `columns` of it to be written. Where `sums` are given, what earlier
// depths gave comes from there (unless `first`), and the tile goes there (unless `last`).
struct Tile {
  void* out;
  Type type;
  int64_t stride, rows, columns;
  bool add;
  float* sums = nullptr;
  bool first = true, last = true;
};

// How one instruction set does it. The inner dimension is counted in words of 4 bytes, of `per_word`
// numbers each.
struct Tiles {
  int64_t rows, columns, per_word;
  int64_t depth;        // words at a time
  int64_t group_bytes;  // of the panels that a thread packs for itself, in its L2
  // As many whole panels as x.lines fill, the last one filled up; each panel_words long.
  void (*pack_a)(Lines x, void* out, int64_t panel_words);
  void (*pack_b)(Lines x, void* out, int64_t panel_words);
  void (*multiply)(const void* a, const void* b, int64_t words, const Tile& tile);
};

// Tiles of AVX512-BF16, which multiply bf16 operands, each with a stride of 1, into fp32; null where
// this CPU, or the compiler of this library, has none, or lesser instructions are asked for.
const Tiles* bf16_tiles();

// False, and nothing done, where `bytes` of `memory` are too few. Per row of the smaller of a and b it
// takes up to Tiles::depth words for fp32 results, and 4 bytes times the inner dimension for 16-bit
// ones; with less it is slower.
bool gemm(const Gemm& g, void* memory, int64_t bytes);

}  // namespace dak
