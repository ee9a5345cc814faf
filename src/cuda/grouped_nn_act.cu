/* grouped_nn_act.cu - gradient of the experts' activation and what lies before it: dy = rows W_e,
 * dh = 2 relu(h) dy prob, BF16. */
#include "grouped_act.cuh"

extern "C" void cuda_grouped_nn_act(const struct grouped *g, const struct grouped_act *act)
{
    grouped_gemm<grouped_row, grouped_row, cutlass::bfloat16_t, cutlass::bfloat16_t,
                 grouped_act_backward>::run(g, *act);
}
