#include "cpu/gemm/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace dak {
namespace {

constexpr int64_t most_words = 1024;         // of the inner dimension at a time, fp32 results
constexpr int64_t least_words = 64;          // with less than that the operands are cut instead
constexpr int64_t group_bytes = 256 * 1024;  // of panels that a thread packs for itself: half an L2

// body(first item, one beyond the last) for groups of `each` of n items, on all threads.
template <class Body>
void in_groups(int64_t n, int64_t each, const Body& body) {
  std::atomic<int64_t> next{0};
  if (n <= each) return body(0, n);
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(each, std::memory_order_relaxed)) < n;) {
      body(i, std::min(i + each, n));
    }
  });
}

char* own_memory(int64_t bytes) {  // of the thread
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return static_cast<char*>(memory.get());
}

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// One operand: its lines are rows of a, or columns of b.
struct Side {
  Matrix x;
  int64_t line, step, lines, width;
  void (*pack)(Lines, void*, int64_t);

  int64_t panels() const { return divided_up(lines, width); }
};

// Part of the inner dimension.
struct Depth {
  int64_t from, length, words;
};

// Panels first to last of `side`, one behind the other.
void pack(const Side& side, Depth d, int64_t first, int64_t last, char* out) {
  int64_t begin = first * side.width, end = std::min(last * side.width, side.lines);
  const char* data = static_cast<const char*>(side.x.data) +
                     (begin * side.line + d.from * side.step) * bytes_of(side.x.type);
  side.pack({data, side.x.type, side.line, side.step, end - begin, d.length}, out,
            side.width * d.words);
}

struct Product {
  const Gemm& g;
  const Tiles& tiles;
  bool share_a;
  Side shared, own;

  Product(const Gemm& g, const Tiles& t) : g(g), tiles(t), share_a(g.m < g.n) {
    Side a{g.a, g.a.row, g.a.column, g.m, t.rows, t.pack_a};
    Side b{g.b, g.b.column, g.b.row, g.n, t.columns, t.pack_b};
    shared = share_a ? a : b;
    own = share_a ? b : a;
  }

  Depth depth(int64_t from, int64_t words) const {
    int64_t length = std::min(words * tiles.per_word, g.inner - from);
    return {from, length, divided_up(length, tiles.per_word)};
  }

  void tile(Depth d, int64_t a, int64_t b, const char* theirs, const char* ours) const {
    int64_t row = a * tiles.rows, column = b * tiles.columns, size = bytes_of(g.out_type);
    Tile tile{static_cast<char*>(g.out) + (row * g.out_row + column) * size, g.out_type, g.out_row,
              std::min(tiles.rows, g.m - row), std::min(tiles.columns, g.n - column),
              g.add || d.from > 0};
    share_a ? tiles.multiply(theirs, ours, d.words, tile)
            : tiles.multiply(ours, theirs, d.words, tile);
  }

  // Panels first to last of the shared operand with all of the other one.
  void step(Depth d, int64_t first, int64_t last, char* memory) const {
    int64_t theirs = 4 * shared.width * d.words, ours = 4 * own.width * d.words;
    in_groups(last - first, 1, [&](int64_t i, int64_t) {
      pack(shared, d, first + i, first + i + 1, memory + i * theirs);
    });
    int64_t each = std::clamp<int64_t>(group_bytes / std::max<int64_t>(ours, 1), 1, own.panels());
    in_groups(own.panels(), each, [&](int64_t begin, int64_t end) {
      char* mine = own_memory(each * ours);
      pack(own, d, begin, end, mine);
      for (int64_t s = first; s < last; s++) {
        for (int64_t i = begin; i < end; i++) {
          tile(d, share_a ? s : i, share_a ? i : s, memory + (s - first) * theirs,
               mine + (i - begin) * ours);
        }
      }
    });
  }
};

}  // namespace

bool gemm(const Gemm& g, void* memory, int64_t bytes) {
  if (g.m == 0 || g.n == 0) return true;
  bool bf16 = g.a.type == Type::bf16 && g.b.type == Type::bf16 && g.out_type == Type::f32;
  const Tiles* best = bf16 ? bf16_tiles() : nullptr;
  Product p(g, best ? *best : *kernels().tiles);
  auto aligned = reinterpret_cast<char*>((uintptr_t(memory) + 63) / 64 * 64);
  int64_t room = (static_cast<char*>(memory) + bytes - aligned) / (4 * p.shared.width);
  int64_t whole = std::max<int64_t>(1, divided_up(g.inner, p.tiles.per_word));
  int64_t panels = p.shared.panels(), words = whole;
  if (g.out_type == Type::f32) {
    words = std::min({whole, most_words, std::max(room / panels, least_words)});
  }
  int64_t held = std::min(panels, room / words);
  if (held < 1) return false;
  held = divided_up(panels, divided_up(panels, held));
  for (int64_t first = 0; first < panels; first += held) {
    int64_t k = 0;
    do {  // once for an inner dimension of 0, which gives 0
      p.step(p.depth(k, words), first, std::min(first + held, panels), aligned);
      k += words * p.tiles.per_word;
    } while (k < g.inner);
  }
  return true;
}

}  // namespace dak
