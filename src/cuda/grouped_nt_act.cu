/* grouped_nt_act.cu - experts' first product with the activation behind it: h = rows W_e^T and y =
 * relu(h)^2 prob, BF16. */
#include "grouped_act.cuh"

extern "C" void cuda_grouped_nt_act(const struct grouped *g, const struct grouped_act *act)
{
    grouped_gemm<grouped_row, grouped_column, void, cutlass::bfloat16_t, grouped_act_forward>::run(
        g, *act);
}
