/* grouped_nn.cu - gradient of the experts' inputs: rows W_e, W_e [out, in], BF16. */
#include "grouped_cutlass.cuh"

extern "C" void cuda_grouped_nn(const struct grouped *g)
{
    using sum = grouped_sum<void, cutlass::bfloat16_t>;
    grouped_gemm<grouped_row, grouped_row, void, cutlass::bfloat16_t, sum>::run(g, { 1.0f, 0.0f });
}
