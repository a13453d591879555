// Prints CuTe's own maps, evaluated on the host: one line each, "name v0 v1 ...". test_layouts.py compares the emulated
// instructions with them, so kernels, emulator and tests cannot share one misreading of the manual. Elements are 16
// bits.
#define CUTE_NVVM_GET_SMEM_POINTER_ACTIVATED 1
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 0
#include <cstdint>
#include <cstdio>

alignas(1024) static unsigned char shared[1 << 16];
static uint32_t __nvvm_get_smem_pointer(const void* address) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(address) - shared);
}

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using SM90::GMMA::Major;
using Element = cutlass::bfloat16_t;

// A fragment: for thread and value, the index (first mode fastest) of the element of the tile.
template <class Map>
void fragment(const char* name, const Map& map) {
  std::printf("%s", name);
  for (int thread = 0; thread < size<0>(map); ++thread) {
    for (int value = 0; value < size<1>(map); ++value) std::printf(" %d", int(map(thread, value)));
  }
  std::printf("\n");
}

// A copy: for thread and 16-bit value of the registers, the (thread, value) of the side in shared memory: who gives the
// address of the row, and which element of that row.
template <class Registers, class Rows>
void matrix(const char* name, const Registers& registers, const Rows& rows) {
  std::printf("%s", name);
  for (int thread = 0; thread < 32; ++thread) {
    for (int value = 0; value < 8; ++value) {
      const int bit = registers(thread, value * 16);
      for (int at = 0; at < 32 * 8; ++at) {
        if (int(rows(at / 8, at % 8 * 16)) == bit) std::printf(" %d", at);
      }
    }
  }
  std::printf("\n");
}

// A tile [MN, K] in shared memory: the byte of every element (MN slow, K fast), then the descriptors of its K steps of
// 16 for the MN range that one wgmma reads.
template <Major MAJOR, class Atom, int MN, int K, int READ>
void tile(const char* kind, int swizzle) {
  auto layout = tile_to_shape(Atom{}, Shape<Int<MN>, Int<K>>{});
  auto tensor = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(shared)), layout);
  std::printf("%s_%d", kind, swizzle);
  for (int mn = 0; mn < MN; ++mn) {
    for (int k = 0; k < K; ++k) {
      std::printf(" %d", int(reinterpret_cast<const unsigned char*>(&tensor(mn, k)) - shared));
    }
  }
  std::printf("\n%s_%d_descriptors", kind, swizzle);
  for (int step = 0; step < K / 16; ++step) {
    auto part = local_tile(tensor, Shape<Int<READ>, _16>{}, make_coord(0, step));
    std::printf(" %llu", static_cast<unsigned long long>(uint64_t(SM90::GMMA::make_gmma_desc<MAJOR>(part))));
  }
  std::printf("\n");
}

int main() {
  using Warp = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  fragment("mma_a", Warp::ALayout{});
  fragment("mma_b", Warp::BLayout{});
  fragment("mma_c", Warp::CLayout{});
  using Load = Copy_Traits<SM75_U32x4_LDSM_N>;
  matrix("ldmatrix_x4", Load::DstLayout{}, Load::SrcLayout{});
  using LoadTransposed = Copy_Traits<SM75_U16x8_LDSM_T>;
  matrix("ldmatrix_x4_transposed", LoadTransposed::DstLayout{}, LoadTransposed::SrcLayout{});
  using Store = Copy_Traits<SM90_U32x4_STSM_N>;
  matrix("stmatrix_x4", Store::SrcLayout{}, Store::DstLayout{});
  using StoreTransposed = Copy_Traits<SM90_U16x8_STSM_T>;
  matrix("stmatrix_x4_transposed", StoreTransposed::SrcLayout{}, StoreTransposed::DstLayout{});

  using Group = MMA_Traits<SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::K>>;
  fragment("wgmma_a", Group::ALayout{});
  fragment("wgmma_c64", Group::CLayout{});
  fragment("wgmma_c128", MMA_Traits<SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::K>>::CLayout{});
  fragment("wgmma_c192", MMA_Traits<SM90::GMMA::MMA_64x192x16_F32BF16BF16_SS<Major::K, Major::K>>::CLayout{});
  fragment("wgmma_c256", MMA_Traits<SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<Major::K, Major::K>>::CLayout{});

  tile<Major::K, SM90::GMMA::Layout_K_INTER_Atom<Element>, 128, 64, 64>("k_major", 0);
  tile<Major::K, SM90::GMMA::Layout_K_SW32_Atom<Element>, 128, 64, 64>("k_major", 32);
  tile<Major::K, SM90::GMMA::Layout_K_SW64_Atom<Element>, 128, 64, 64>("k_major", 64);
  tile<Major::K, SM90::GMMA::Layout_K_SW128_Atom<Element>, 128, 64, 64>("k_major", 128);
  tile<Major::MN, SM90::GMMA::Layout_MN_INTER_Atom<Element>, 128, 64, 128>("mn_major", 0);
  tile<Major::MN, SM90::GMMA::Layout_MN_SW32_Atom<Element>, 128, 64, 128>("mn_major", 32);
  tile<Major::MN, SM90::GMMA::Layout_MN_SW64_Atom<Element>, 128, 64, 128>("mn_major", 64);
  tile<Major::MN, SM90::GMMA::Layout_MN_SW128_Atom<Element>, 128, 64, 128>("mn_major", 128);
}
