#include "cpu/gemm/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace dak {
namespace {

constexpr int64_t least_depth = 64;         // words; with less the operands are cut instead
constexpr int64_t sums_bytes = 512 * 1024;  // of a thread, what a group of panels may need

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

  // The tile of the panels `theirs` of the shared operand and `ours` of the other one.
  Tile tile(int64_t theirs, int64_t ours) const {
    int64_t row = (share_a ? theirs : ours) * tiles.rows;
    int64_t column = (share_a ? ours : theirs) * tiles.columns;
    char* out = static_cast<char*>(g.out) + (row * g.out_row + column) * bytes_of(g.out_type);
    return {out, g.out_type, g.out_row, std::min(tiles.rows, g.m - row),
            std::min(tiles.columns, g.n - column), g.add};
  }

  void multiply(const char* theirs, const char* ours, Depth d, const Tile& tile) const {
    share_a ? tiles.multiply(theirs, ours, d.words, tile)
            : tiles.multiply(ours, theirs, d.words, tile);
  }

  // Panels first to last of the shared operand, of one depth, on all threads.
  void share(Depth d, int64_t first, int64_t last, char* memory) const {
    in_groups(last - first, 1, [&](int64_t i, int64_t) {
      pack(shared, d, first + i, first + i + 1, memory + i * 4 * shared.width * d.words);
    });
  }

  // All panels of the other operand, packed by groups of `each` for one depth after another, with
  // panels first to last of the shared one, which lie depth by depth in `memory`.
  void multiply_all(const std::vector<Depth>& depths, int64_t first, int64_t last,
                    const char* memory) const {
    int64_t width = own.width, count = last - first, size = 4 * tiles.rows * tiles.columns;
    int64_t deepest = std::max<int64_t>(depths[0].words, 1);
    bool carried = depths.size() > 1;
    int64_t each = std::clamp<int64_t>(tiles.group_bytes / (4 * width * deepest), 1, own.panels());
    if (carried) each = std::clamp<int64_t>(sums_bytes / (count * size), 1, each);
    int64_t panel_bytes = (each * 4 * width * deepest + 63) / 64 * 64;
    in_groups(own.panels(), each, [&](int64_t begin, int64_t end) {
      char* mine = own_memory(panel_bytes + (carried ? each * count * size : 0));
      const char* shared_panels = memory;
      for (Depth d : depths) {
        pack(own, d, begin, end, mine);
        int64_t theirs = 4 * shared.width * d.words, ours = 4 * width * d.words;
        char* sums = mine + panel_bytes;
        for (int64_t s = first; s < last; s++, shared_panels += theirs) {
          for (int64_t i = begin; i < end; i++, sums += size) {
            Tile t = tile(s, i);
            t.add |= !carried && d.from > 0;
            if (carried) {
              t.sums = reinterpret_cast<float*>(sums);
              t.first = d.from == 0;
              t.last = d.from + d.length == g.inner;
            }
            multiply(shared_panels, mine + (i - begin) * ours, d, t);
          }
        }
      }
    });
  }
};

}  // namespace

bool gemm(const Gemm& g, void* memory, int64_t bytes) {
  if (g.m == 0 || g.n == 0) return true;
  // Tiles of bf16 read pairs, or lines, that lie side by side.
  auto takes = [](const Matrix& x) {
    return x.type == Type::bf16 && (x.row == 1 || x.column == 1);
  };
  bool bf16 = takes(g.a) && takes(g.b) && g.out_type == Type::f32;
  const Tiles* best = bf16 ? bf16_tiles() : nullptr;
  Product p(g, best ? *best : *kernels().tiles);
  auto aligned = reinterpret_cast<char*>((uintptr_t(memory) + 63) / 64 * 64);
  int64_t room = (static_cast<char*>(memory) + bytes - aligned) / (4 * p.shared.width);
  int64_t whole = std::max<int64_t>(1, divided_up(g.inner, p.tiles.per_word));
  int64_t panels = p.shared.panels(), depth = std::min(whole, p.tiles.depth);
  // 16-bit results are written once, out of sums over the whole inner dimension.
  bool once = g.out_type != Type::f32;
  if (!once) depth = std::min(depth, std::max(room / panels, least_depth));
  int64_t held = std::min(panels, room / (once ? whole : depth));
  if (held < 1) return false;
  held = divided_up(panels, divided_up(panels, held));
  std::vector<Depth> depths;
  for (int64_t k = 0; k == 0 || k < g.inner; k += depth * p.tiles.per_word) {
    depths.push_back(p.depth(k, depth));
  }
  for (int64_t first = 0; first < panels; first += held) {
    int64_t last = std::min(first + held, panels);
    char* at = aligned;
    for (const Depth& d : depths) {
      p.share(d, first, last, at);
      if (once) {
        at += (last - first) * 4 * p.shared.width * d.words;
      } else {
        p.multiply_all({d}, first, last, at);
      }
    }
    if (once) p.multiply_all(depths, first, last, aligned);
  }
  return true;
}

}  // namespace dak
