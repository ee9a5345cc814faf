/* grouped_act.cuh - epilogues of the experts' products that apply the activation y = relu(h)^2 p
 * (model.md 1.8, step 8): a pass over memory less, for 1.5 % of the product's time forward and 8 %
 * backward, where h is read.
 *
 * A warpgroup holds a tile of 128x192 sums and visits it in pieces of 64x32: a thread has rows r
 * and r+8, r = 16 (warp) + lane/4, and columns 8j + 2(lane%4) + {0,1}, j = 0..3; element 4j + 2i +
 * c of the piece is row r+8i, column 8j + 2(lane%4) + c. CUTLASS stores what a visit returns; the
 * second matrix of the same shape is stored here, 16 bytes a thread, after the four lanes of a row
 * have exchanged their words.
 */
#ifndef MIMO_CUDA_GROUPED_ACT_CUH
#define MIMO_CUDA_GROUPED_ACT_CUH

#include <cuda_bf16.h>
#include "grouped_cutlass.cuh"

/* What both directions share: the thread's place, the probabilities of its rows, the second
 * matrix. */
struct grouped_act_callbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    const grouped_act &arg;
    int first, rows, cols; /* of the group: row of arg.* where it begins, size */
    /* of the thread in the group, at the tile's first piece; of the tile */
    int row, col, tile_n;
    float p[2][2]; /* rows row + 64 m + 8 i */

    template <class Args>
    CUTLASS_DEVICE grouped_act_callbacks(const grouped_act &arg, const Args &args) : arg(arg)
    {
        auto [m, n, k, group] = args.tile_coord_mnkl;
        const int lane = args.thread_idx % 32, warp = args.thread_idx / 32;
        first = arg.offsets[group];
        rows = cute::get<0>(args.problem_shape_mnkl);
        cols = cute::get<1>(args.problem_shape_mnkl);
        row = m * GROUPED_TILE_M + warp * 16 + lane / 4;
        col = n * GROUPED_TILE_N + 8 * (lane % 4);
        tile_n = n;
    }

    CUTLASS_DEVICE void begin()
    {
        for (int m = 0; m < 2; m++)
            for (int i = 0; i < 2; i++) {
                const int r = row + 64 * m + 8 * i;
                p[m][i] = r < rows ? arg.prob[first + r] : 0.0f;
            }
    }

    /* Stores the piece's words, word[i][j] = the thread's two columns of row i: lane q of a row
     * gets columns 8q.. whole. */
    CUTLASS_DEVICE void store(uint32_t (&word)[2][4], int m, int n)
    {
        const unsigned all = 0xffffffffu;
        const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
        for (int i = 0; i < 2; i++) {
            uint32_t(&w)[4] = word[i];
            const uint32_t a = __shfl_xor_sync(all, odd ? w[0] : w[1], 1),
                           b = __shfl_xor_sync(all, odd ? w[2] : w[3], 1);
            (odd ? w[0] : w[1]) = a;
            (odd ? w[2] : w[3]) = b;
            const uint32_t c = __shfl_xor_sync(all, high ? w[0] : w[2], 2),
                           d = __shfl_xor_sync(all, high ? w[1] : w[3], 2);
            (high ? w[0] : w[2]) = c;
            (high ? w[1] : w[3]) = d;
            const int r = row + 64 * m + 8 * i, x = col + 32 * n;
            if (r < rows && x < cols)
                *(uint4 *)((__nv_bfloat16 *)arg.second + (int64_t)(first + r) * arg.ld + x) =
                    make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
};

CUTLASS_DEVICE float grouped_relu(float x)
{
    return x < 0.0f ? 0.0f : x; /* keeps a NaN */
}

CUTLASS_DEVICE uint32_t grouped_word(float low, float high)
{
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&two;
}

/* What CUTLASS asks of a fusion, beside its callbacks. */
template <bool reads_c>
struct grouped_act_fusion : cutlass::epilogue::fusion::detail::Sm90VisitorImpl<> {
    struct SharedStorage {
    };
    using Arguments = grouped_act;
    using Params = grouped_act;
    Params params;

    template <class Shape>
    static constexpr Params to_underlying_arguments(const Shape &, const Arguments &a, void *)
    {
        return a;
    }
    template <class Shape> static bool can_implement(const Shape &, const Arguments &)
    {
        return true;
    }
    template <class Shape> static size_t get_workspace_size(const Shape &, const Arguments &)
    {
        return 0;
    }
    template <class Shape>
    static cutlass::Status initialize_workspace(const Shape &, const Arguments &, void *,
                                                cudaStream_t, cutlass::CudaHostAdapter * = nullptr)
    {
        return cutlass::Status::kSuccess;
    }
    CUTLASS_HOST_DEVICE grouped_act_fusion() {}
    CUTLASS_HOST_DEVICE grouped_act_fusion(const Params &p, const SharedStorage &) : params(p) {}
    CUTLASS_DEVICE bool is_producer_load_needed() const
    {
        return reads_c;
    }
    CUTLASS_DEVICE bool is_C_load_needed() const
    {
        return reads_c;
    }
    template <class... A>
    CUTLASS_DEVICE auto get_producer_load_callbacks(
        const cutlass::epilogue::fusion::detail::ProducerLoadArgs<A...> &)
    {
        return cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
    }
};

/* D = y, second = h: y is made of the rounded h, as backward reads it. */
struct grouped_act_forward : grouped_act_fusion<false> {
    using grouped_act_fusion<false>::grouped_act_fusion;

    struct callbacks : grouped_act_callbacks {
        using grouped_act_callbacks::grouped_act_callbacks;

        template <class T, int N>
        CUTLASS_DEVICE auto visit(const cutlass::Array<T, N> &sum, int, int m, int n)
        {
            static_assert(N == 16);
            cutlass::Array<float, N> y;
            uint32_t word[2][4];
            CUTLASS_PRAGMA_UNROLL
            for (int at = 0; at < N; at += 2) {
                const int i = at / 2 % 2;
                word[i][at / 4] = grouped_word(sum[at], sum[at + 1]);
                CUTLASS_PRAGMA_UNROLL
                for (int c = 0; c < 2; c++) {
                    const uint32_t bits = c ? word[i][at / 4] & 0xffff0000u : word[i][at / 4] << 16;
                    const float positive = grouped_relu(__uint_as_float(bits));
                    y[at + c] = positive * positive * p[m][i];
                }
            }
            store(word, m, n);
            return y;
        }
    };

    template <bool ReferenceSrc, class... A>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(
        const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<A...> &args)
    {
        return callbacks(params, args);
    }
};

/* C = h, D = dh, second = y; partial[row, tile of columns] = sum of relu(h)^2 dy over the tile's
 * columns. */
struct grouped_act_backward : grouped_act_fusion<true> {
    using grouped_act_fusion<true>::grouped_act_fusion;

    template <class Source> struct callbacks : grouped_act_callbacks {
        const Source &h;
        float total[2][2];

        template <class Args>
        CUTLASS_DEVICE callbacks(const grouped_act &arg, const Args &args)
            : grouped_act_callbacks(arg, args), h(args.tCrC), total{}
        {
        }

        template <class T, int N>
        CUTLASS_DEVICE auto visit(const cutlass::Array<T, N> &dy, int v, int m, int n)
        {
            static_assert(N == 16);
            using Element = typename Source::value_type;
            const cutlass::Array<Element, N> from = cute::recast<cutlass::Array<Element, N>>(h)(v);
            cutlass::Array<float, N> dh;
            uint32_t word[2][4];
            CUTLASS_PRAGMA_UNROLL
            for (int at = 0; at < N; at += 2) {
                const int i = at / 2 % 2;
                float y[2];
                CUTLASS_PRAGMA_UNROLL
                for (int c = 0; c < 2; c++) {
                    const float positive = grouped_relu(float(from[at + c])),
                                slope = positive * dy[at + c];
                    total[m][i] += positive * slope;
                    dh[at + c] = slope * (2.0f * p[m][i]);
                    y[c] = positive * positive * p[m][i];
                }
                word[i][at / 4] = grouped_word(y[0], y[1]);
            }
            if (arg.second)
                store(word, m, n);
            return dh;
        }

        CUTLASS_DEVICE void end()
        {
            const int tiles = (cols + GROUPED_TILE_N - 1) / GROUPED_TILE_N;
            for (int m = 0; m < 2; m++)
                for (int i = 0; i < 2; i++) {
                    float x = total[m][i];
                    x += __shfl_xor_sync(0xffffffffu, x, 1);
                    x += __shfl_xor_sync(0xffffffffu, x, 2);
                    const int r = row + 64 * m + 8 * i;
                    if (threadIdx.x % 4 == 0 && r < rows)
                        arg.partial[(int64_t)(first + r) * tiles + tile_n] = x;
                }
        }
    };

    template <bool ReferenceSrc, class... A>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(
        const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<A...> &args)
    {
        return callbacks<cute::remove_cvref_t<decltype(args.tCrC)>>(params, args);
    }
};

#endif
