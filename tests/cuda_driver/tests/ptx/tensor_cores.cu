// Matrix products with tensor cores, by NVIDIA's own headers: nvcc -arch=sm_80 -ptx -I<cccl> tensor_cores.cu
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>
#include <type_traits>
using namespace nvcuda;

// C[m][n] += A[m][k] B, by rows, one tile a warp; B by rows as [k][n], or by columns as [n][k].
template <typename T, int M, int N, int K, typename Layout>
__device__ void tile(const T *a, const T *b, float *c, int m, int n, int k) {
    int rows = blockIdx.y * M, columns = blockIdx.x * N;
    wmma::fragment<wmma::matrix_a, M, N, K, T, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, M, N, K, T, Layout> fb;
    wmma::fragment<wmma::accumulator, M, N, K, float> fc;
    wmma::load_matrix_sync(fc, c + rows * n + columns, n, wmma::mem_row_major);
    for (int i = 0; i < k; i += K) {
        wmma::load_matrix_sync(fa, a + rows * k + i, k);
        if (std::is_same<Layout, wmma::row_major>::value) wmma::load_matrix_sync(fb, b + i * n + columns, n);
        else wmma::load_matrix_sync(fb, b + columns * k + i, k);
        wmma::mma_sync(fc, fa, fb, fc);
    }
    wmma::store_matrix_sync(c + rows * n + columns, fc, n, wmma::mem_row_major);
}
extern "C" __global__ void f16_16x16(const half *a, const half *b, float *c, int m, int n, int k) {
    tile<half, 16, 16, 16, wmma::row_major>(a, b, c, m, n, k);
}
extern "C" __global__ void f16_32x8(const half *a, const half *b, float *c, int m, int n, int k) {
    tile<half, 32, 8, 16, wmma::col_major>(a, b, c, m, n, k);
}
extern "C" __global__ void f16_8x32(const half *a, const half *b, float *c, int m, int n, int k) {
    tile<half, 8, 32, 16, wmma::col_major>(a, b, c, m, n, k);
}
extern "C" __global__ void bf16_16x16(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int m, int n, int k) {
    tile<__nv_bfloat16, 16, 16, 16, wmma::row_major>(a, b, c, m, n, k);
}
extern "C" __global__ void bf16_32x8(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int m, int n, int k) {
    tile<__nv_bfloat16, 32, 8, 16, wmma::col_major>(a, b, c, m, n, k);
}
extern "C" __global__ void bf16_8x32(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int m, int n, int k) {
    tile<__nv_bfloat16, 8, 32, 16, wmma::col_major>(a, b, c, m, n, k);
}

// The same with asynchronous copies, ldmatrix and mma.m16n8k16; B by columns (as [n][k]).
extern "C" __global__ void f16_mma(const half *a, const half *b, float *c, int m, int n, int k) {
    __shared__ __align__(16) half sa[16 * 16], sb[8 * 16];
    int lane = threadIdx.x, rows = blockIdx.y * 16, columns = blockIdx.x * 8;
    float d[4] = {0, 0, 0, 0};
    for (int i = 0; i < k; i += 16) {
        __pipeline_memcpy_async(sa + lane * 8, a + (rows + lane / 2) * k + i + lane % 2 * 8, 16);
        if (lane < 16) __pipeline_memcpy_async(sb + lane * 8, b + (columns + lane / 2) * k + i + lane % 2 * 8, 16);
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncwarp();
        unsigned fa[4], fb[2];
        unsigned pa = __cvta_generic_to_shared(sa + lane % 16 * 16 + lane / 16 * 8);
        unsigned pb = __cvta_generic_to_shared(sb + lane % 8 * 16 + lane / 8 % 2 * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(pa));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(fb[0]), "=r"(fb[1]) : "r"(pb));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
        __syncwarp();
    }
    for (int i = 0; i < 4; i++) {
        int row = rows + lane / 4 + i / 2 * 8, column = columns + lane % 4 * 2 + i % 2;
        c[row * n + column] += d[i];
    }
}
