// The matrix units of x86-64 processors (AMX): eight registers of 16 rows of 64 bytes. Included inside an anonymous
// namespace (see line_kernels.h).

constexpr int64_t kTile = 16;  // rows of a tile, columns of an accumulator

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// In memory before anything is asked of it: the compiler does not know that the instruction reads more than a pointer.
const TileConfig kFullTiles{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Eight full tiles for as long as it lives; whatever configuration the thread had is put back.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    _tile_loadconfig(&kFullTiles);
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// A block of MT x NT accumulators, at most 2 x 2, in tiles 0 to 3.
template <int MT, int NT>
void zero_block() {
  _tile_zero(0);
  if (NT > 1) _tile_zero(1);
  if (MT > 1) _tile_zero(2);
  if (MT > 1 && NT > 1) _tile_zero(3);
}

// To C[16 * MT, 16 * NT], ldc in floats.
template <int MT, int NT>
void store_block(float* c, int64_t ldc) {
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, stride);
  if (NT > 1) _tile_stored(1, c + kTile, stride);
  if (MT > 1) _tile_stored(2, c + kTile * ldc, stride);
  if (MT > 1 && NT > 1) _tile_stored(3, c + kTile * ldc + kTile, stride);
}
