// AMX's tile registers in software, as far as native.cpp uses them: its order of loads, layouts and sums can then be
// tested on any processor. Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS.
#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

struct EmulatedTile {
    unsigned char rows[16][64];
};
static thread_local EmulatedTile emulated_tiles[8];

static void emulated_load(int tile, const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++)
        std::memcpy(emulated_tiles[tile].rows[row], static_cast<const char*>(from) + row * stride, 64);
}

static void emulated_store(int tile, void* to, int64_t stride) {
    for (int row = 0; row < 16; row++)
        std::memcpy(static_cast<char*>(to) + row * stride, emulated_tiles[tile].rows[row], 64);
}

static float emulated_half(const unsigned char* bytes) {
    uint32_t bits = uint32_t(bytes[0]) << 16 | uint32_t(bytes[1]) << 24;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static void emulated_product(int sums, int left, int right) {
    for (int row = 0; row < 16; row++)
        for (int group = 0; group < 16; group++)
            for (int column = 0; column < 16; column++) {
                unsigned char* place = emulated_tiles[sums].rows[row] + 4 * column;
                const unsigned char* one = emulated_tiles[left].rows[row] + 4 * group;
                const unsigned char* other = emulated_tiles[right].rows[group] + 4 * column;
                float sum;
                std::memcpy(&sum, place, sizeof sum);
                sum += emulated_half(one) * emulated_half(other);
                sum += emulated_half(one + 2) * emulated_half(other + 2);
                std::memcpy(place, &sum, sizeof sum);
            }
}

#define _tile_loadconfig(shape) static_cast<void>(shape)
#define _tile_zero(tile) emulated_tiles[tile] = {}
#define _tile_loadd(tile, from, stride) emulated_load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated_product(sums, left, right)
