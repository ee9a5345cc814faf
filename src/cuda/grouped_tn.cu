/* grouped_tn.cu - gradient of the experts' weights, in place: dW_e = beta dW_e + dY_e^T X_e, F32
 * from BF16. With beta 0 the kernel does not read dW_e. */
#include "grouped_cutlass.cuh"

extern "C" void cuda_grouped_tn(const struct grouped *g, float beta)
{
    using sum = grouped_sum<float, float>;
    grouped_gemm<grouped_column, grouped_row, float, float, sum>::run(g, { 1.0f, beta });
}
