// The layer's last step, x + gamma * attended, and its backward pass, between maps that are NCHW or channels-last in
// memory, and copies to channels-last memory. A CTA takes 64 positions x 64 channels. What is NCHW passes through shared
// memory, so that lanes always move neighbours: along channels in channels-last maps, across them, along the positions of
// one channel, in NCHW ones.
#pragma once

#include "lines_io.h"

namespace ccnet {
namespace cuda {

enum class ResidualStep {
  kCopy,      // out = x
  kForward,   // out = x + gamma * attended
  kBackward,  // out = gamma * x, where x is the result's gradient and out that of attended; sums of x * attended
};

constexpr int kResidualTile = 64;
constexpr int kResidualThreads = 1024;
constexpr int kResidualWarps = kResidualThreads / kWarp;
// A row of the tile's channels in shared memory: one word longer, so that rows begin in different banks.
template <typename T>
constexpr int kResidualRowBytes = kResidualTile * static_cast<int>(sizeof(T)) + 4;
template <typename T>
constexpr int kResidualSharedBytes = kResidualTile * kResidualRowBytes<T> + kResidualWarps * 4;

// Strides in elements.
template <typename T>
struct ResidualMap {
  T* data;
  int64_t batch, channel, position;
};

template <typename T>
struct ResidualArgs {
  ResidualMap<const T> attended;  // channel stride 1, as that of every map that is not across
  ResidualMap<const T> x;
  ResidualMap<T> out;
  bool x_across, out_across;  // NCHW; the result is so in the forward pass alone
  const float* gamma;
  float* sums;  // one of each CTA
  int channels;
  int64_t positions;
  int64_t position_tiles, channel_tiles;
  int64_t blocks;
};

struct ResidualSumArgs {
  const float* sums;
  int64_t count;
  float* total;
  int64_t blocks;
};

// `Width` channels that a lane moves at a time: 1, or 2 of 16 bits each.
template <typename T, int Width>
struct ResidualUnit {
  using Word = T;
  static CCNET_DEVICE void unpack(Word word, float (&v)[1]) { v[0] = to_float<T>(word); }
  static CCNET_DEVICE Word pack(const float (&v)[1]) { return from_float<T>(v[0]); }
};
template <typename T>
struct ResidualUnit<T, 2> {
  using Word = uint32_t;
  static CCNET_DEVICE void unpack(Word word, float (&v)[2]) { unpack_pair<T>(word, v[0], v[1]); }
  static CCNET_DEVICE Word pack(const float (&v)[2]) { return cuda::pack<T>(v[0], v[1]); }
};

// The tile of one CTA, and what each thread has of it.
template <typename T, int Width>
class ResidualTile {
 public:
  using Unit = ResidualUnit<T, Width>;
  using Word = typename Unit::Word;
  // Elements of a thread across the channels, and words along them.
  static constexpr int kAcrossChannels = kResidualTile / kResidualWarps;
  static constexpr int kAcrossPositions = kResidualTile / kWarp;
  static constexpr int kRows = kResidualTile / kResidualWarps;
  static constexpr int kWords = kResidualTile / (kWarp * Width);

  CCNET_DEVICE explicit ResidualTile(const ResidualArgs<T>& a)
      : lane_(thread_index() % kWarp), warp_(thread_index() / kWarp) {
    // Neighbouring CTAs have neighbouring positions: the rows of NCHW maps begin anywhere in a cache line.
    const int64_t tile = block_index() / a.position_tiles;
    position0_ = (block_index() - tile * a.position_tiles) * kResidualTile;
    batch_ = tile / a.channel_tiles;
    channel0_ = (tile - batch_ * a.channel_tiles) * kResidualTile;
    positions_ = static_cast<int>(min_of(a.positions - position0_, int64_t{kResidualTile}));
    channels_ = static_cast<int>(min_of(a.channels - channel0_, int64_t{kResidualTile}));
  }

  CCNET_DEVICE void load_along(Word (&v)[kRows][kWords], const ResidualMap<const T>& map) const {
    for_along([&](int i, int j, int position, int channel) {
      v[i][j] = load_global(reinterpret_cast<const Word*>(corner(map) + (position * map.position + channel)));
    });
  }
  CCNET_DEVICE void store_along(const Word (&v)[kRows][kWords], const ResidualMap<T>& map) const {
    for_along([&](int i, int j, int position, int channel) {
      store_global(reinterpret_cast<Word*>(corner(map) + (position * map.position + channel)), v[i][j]);
    });
  }
  CCNET_DEVICE void load_across(T (&v)[kAcrossChannels][kAcrossPositions], const ResidualMap<const T>& map) const {
    for_across([&](int i, int j, int position, int channel) {
      v[i][j] = load_global(corner(map) + (channel * map.channel + position));
    });
  }
  // The tile in shared memory as it is read across and along the channels; the two are a barrier apart.
  CCNET_DEVICE void put_across(char* shared, const T (&v)[kAcrossChannels][kAcrossPositions]) const {
    for_across([&](int i, int j, int position, int channel) {
      store_shared<T>(place(shared, position, channel), v[i][j]);
    });
  }
  CCNET_DEVICE void get_along(const char* shared, Word (&v)[kRows][kWords]) const {
    for_along([&](int i, int j, int position, int channel) {
      v[i][j] = load_shared<Word>(place(const_cast<char*>(shared), position, channel));
    });
  }
  CCNET_DEVICE void put_along(char* shared, const Word (&v)[kRows][kWords]) const {
    for_along([&](int i, int j, int position, int channel) {
      store_shared<Word>(place(shared, position, channel), v[i][j]);
    });
  }
  CCNET_DEVICE void get_across(const char* shared, T (&v)[kAcrossChannels][kAcrossPositions]) const {
    for_across([&](int i, int j, int position, int channel) {
      v[i][j] = load_shared<T>(place(const_cast<char*>(shared), position, channel));
    });
  }
  CCNET_DEVICE void store_across(const T (&v)[kAcrossChannels][kAcrossPositions], const ResidualMap<T>& map) const {
    for_across([&](int i, int j, int position, int channel) {
      store_global(corner(map) + (channel * map.channel + position), v[i][j]);
    });
  }

  // Runs body(i, j, position, channel) for what the thread has of the tile.
  template <typename Body>
  CCNET_DEVICE void for_along(const Body& body) const {
    CCNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CCNET_UNROLL
      for (int j = 0; j < kWords; ++j) {
        const int position = warp_ + kResidualWarps * i, channel = (lane_ + kWarp * j) * Width;
        if (position < positions_ && channel < channels_) body(i, j, position, channel);
      }
    }
  }
  template <typename Body>
  CCNET_DEVICE void for_across(const Body& body) const {
    CCNET_UNROLL
    for (int i = 0; i < kAcrossChannels; ++i) {
      CCNET_UNROLL
      for (int j = 0; j < kAcrossPositions; ++j) {
        const int position = lane_ + kWarp * j, channel = warp_ + kResidualWarps * i;
        if (position < positions_ && channel < channels_) body(i, j, position, channel);
      }
    }
  }

 private:
  template <typename Map>
  CCNET_DEVICE auto corner(const Map& map) const {
    return map.data + (batch_ * map.batch + channel0_ * map.channel + position0_ * map.position);
  }
  static CCNET_DEVICE char* place(char* shared, int position, int channel) {
    return shared + position * kResidualRowBytes<T> + channel * static_cast<int>(sizeof(T));
  }

  int lane_, warp_;
  int64_t batch_, position0_, channel0_;
  int positions_, channels_;
};

// By single elements a thread has twice as many, and needs as many registers.
template <typename T, int Width, ResidualStep Step>
CCNET_KERNEL(kResidualThreads, Width == 1 ? 1 : 2)
void residual_kernel(ResidualArgs<T> a) {
  using Tile = ResidualTile<T, Width>;
  using Unit = typename Tile::Unit;
  char* const shared = dynamic_shared();
  const Tile tile(a);
  typename Tile::Word x[Tile::kRows][Tile::kWords], attended[Tile::kRows][Tile::kWords];
  if (Step != ResidualStep::kCopy) tile.load_along(attended, a.attended);
  if (a.x_across) {
    T across[Tile::kAcrossChannels][Tile::kAcrossPositions];
    tile.load_across(across, a.x);
    if (Step == ResidualStep::kForward && a.out_across) {
      // What is attended alone changes sides.
      tile.put_along(shared, attended);
      barrier();
      T with[Tile::kAcrossChannels][Tile::kAcrossPositions];
      tile.get_across(shared, with);
      const float gamma = load_global(a.gamma);
      tile.for_across([&](int i, int j, int, int) {
        across[i][j] = from_float<T>(fmaf(gamma, to_float<T>(with[i][j]), to_float<T>(across[i][j])));
      });
      tile.store_across(across, a.out);
      return;
    }
    tile.put_across(shared, across);
    barrier();
    tile.get_along(shared, x);
  } else {
    tile.load_along(x, a.x);
  }
  float sum = 0.f;
  if (Step != ResidualStep::kCopy) {
    const float gamma = load_global(a.gamma);
    tile.for_along([&](int i, int j, int, int) {
      float from[Width], with[Width];
      Unit::unpack(x[i][j], from);
      Unit::unpack(attended[i][j], with);
      CCNET_UNROLL
      for (int e = 0; e < Width; ++e) {
        if (Step == ResidualStep::kForward) {
          from[e] = fmaf(gamma, with[e], from[e]);
        } else {
          sum = fmaf(from[e], with[e], sum);
          from[e] *= gamma;
        }
      }
      x[i][j] = Unit::pack(from);
    });
  }
  if (Step == ResidualStep::kForward && a.out_across) {
    tile.put_along(shared, x);
    barrier();
    T across[Tile::kAcrossChannels][Tile::kAcrossPositions];
    tile.get_across(shared, across);
    tile.store_across(across, a.out);
  } else {
    tile.store_along(x, a.out);
  }
  if (Step == ResidualStep::kBackward) {
    CCNET_UNROLL
    for (int bit = 1; bit < kWarp; bit *= 2) sum += shuffle_xor(sum, bit);
    char* const warp_sums = shared + kResidualTile * kResidualRowBytes<T>;
    if (thread_index() % kWarp == 0) store_shared<float>(warp_sums + thread_index() / kWarp * 4, sum);
    barrier();
    if (thread_index() == 0) {
      float total = 0.f;
      CCNET_UNROLL
      for (int w = 0; w < kResidualWarps; ++w) total += load_shared<float>(warp_sums + w * 4);
      store_global(a.sums + block_index(), total);
    }
  }
}

// The sum of the CTAs' sums, as a `Sum`, by one CTA, always in the same order.
template <typename Sum>
CCNET_KERNEL(kResidualThreads, 1)
void residual_sum_kernel(ResidualSumArgs a) {
  char* const own = dynamic_shared() + thread_index() * static_cast<int>(sizeof(Sum));
  Sum sum = 0;
  for (int64_t i = thread_index(); i < a.count; i += kResidualThreads) sum += static_cast<Sum>(load_global(a.sums + i));
  store_shared<Sum>(own, sum);
  CCNET_UNROLL_BY(1)
  for (int half = kResidualThreads / 2; half > 0; half /= 2) {
    barrier();
    if (thread_index() < half) {
      sum += load_shared<Sum>(own + half * static_cast<int>(sizeof(Sum)));
      store_shared<Sum>(own, sum);
    }
  }
  if (thread_index() == 0) store_global(a.total, static_cast<float>(sum));
}

}  // namespace cuda
}  // namespace ccnet
