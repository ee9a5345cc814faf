/* grouped_nt.cu - experts forward: rows W_e^T, W_e [out, in], BF16. */
#include "grouped_cutlass.cuh"

extern "C" void cuda_grouped_nt(const struct grouped *g)
{
    using sum = grouped_sum<void, cutlass::bfloat16_t>;
    grouped_gemm<grouped_row, grouped_column, void, cutlass::bfloat16_t, sum>::run(g,
                                                                                   { 1.0f, 0.0f });
}
