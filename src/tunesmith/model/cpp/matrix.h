// Rows times strips of 32 outputs by the matrix unit of newer Intel processors, of few rows while what comes next is on its way from memory.
//
// Weights that are read once a step take longer to come than to be multiplied, and a product that waits for each piece does one after the
// other. Here the next strip is asked for between the multiplications of this one. A strip lies in one piece, as memory gives it fastest.
#pragma once
#include "vectors.h"
#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t FEW = 64;     // rows up to which weights take longer to come than to be multiplied
constexpr int64_t LINE = 64;    // bytes that memory gives at once, and a vector or a tile has in a row
constexpr int64_t STRIP = 32;   // outputs of a strip
constexpr int64_t WIDTH = 128;  // bytes of a strip that lie side by side: two inputs in bf16 or four in 8 bits of each output
constexpr int64_t PITCH = 256;  // bytes between rows of sums: 64 of four bytes

#ifdef MATRIX_UNIT

constexpr int64_t TILE = 16;    // rows of a tile, each of 64 bytes
constexpr int64_t DEEP = 2048;  // bytes of a strip that meet one row of a tile: 32 inputs in bf16, 64 in 8 bits

struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Whether this process may use the unit: Linux wants to be asked (ARCH_REQ_XCOMP_PERM, tile data).
inline bool matrix_unit() {
    static const bool may = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return may;
}

// What was stored is in memory from here on: GCC's functions for tiles do not tell the compiler that they read it (seen with 12).
inline void settle() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 hold sums, two beside each other for each sixteen of at most 32 rows; 4 and 5 rows, 6 and 7 weights.
inline void shape_tiles(int64_t rows) {
    Shape shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = LINE, shape.rows[i] = TILE;
    shape.rows[0] = shape.rows[1] = shape.rows[4] = uint8_t(std::min(rows, TILE));
    if (rows > TILE) shape.rows[2] = shape.rows[3] = shape.rows[5] = uint8_t(rows - TILE);
    settle();
    _tile_loadconfig(&shape);
}

// Up to 16 rows, or with TWO up to 32. `next` is a strip too, or null.
template <bool SMALL, bool TWO>
void few_rows(const char* rows, int64_t stride, const char* weights, char* out, int64_t depth, const char* next) {
    settle();
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) _tile_zero(2);
    if (TWO) _tile_zero(3);
    for (int64_t k = 0; k < depth; k++) {
        _tile_loadd(4, rows + k * LINE, stride);
        _tile_loadd(6, weights + k * DEEP, WIDTH);
        _tile_loadd(7, weights + k * DEEP + LINE, WIDTH);
        if (TWO) _tile_loadd(5, rows + TILE * stride + k * LINE, stride);
        if (next)
            for (int64_t at = k * DEEP; at < (k + 1) * DEEP; at += LINE) ask(next + at);
        if (SMALL) {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            if (TWO) _tile_dpbusd(2, 5, 6);
            if (TWO) _tile_dpbusd(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (TWO) _tile_dpbf16ps(2, 5, 6);
            if (TWO) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, PITCH);
    _tile_stored(1, out + LINE, PITCH);
    if (TWO) _tile_stored(2, out + TILE * PITCH, PITCH);
    if (TWO) _tile_stored(3, out + TILE * PITCH + LINE, PITCH);
}

// Half of out [rows, 64] in four bytes each, the tiles being shaped for `shaped` of them at a time.
template <bool SMALL>
void strip(int64_t rows, int64_t shaped, const char* from, int64_t stride, const char* weights, void* out, int64_t depth, const char* next) {
    for (int64_t first = 0; first < rows; first += 2 * TILE, next = nullptr) {
        const int64_t count = std::min(2 * TILE, rows - first);
        if (count != shaped) shape_tiles(count);
        auto call = count > TILE ? few_rows<SMALL, true> : few_rows<SMALL, false>;
        call(from + first * stride, stride, weights, static_cast<char*>(out) + first * PITCH, depth, next);
        if (count != shaped) shape_tiles(shaped);
    }
}

#endif

}  // namespace
