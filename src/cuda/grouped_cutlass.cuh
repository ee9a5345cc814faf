/* grouped_cutlass.cuh - one grouped GEMM of CUTLASS for sm_90a: the template behind grouped_nt.cu,
 * grouped_nn.cu and grouped_tn.cu, one file each because an instantiation takes most of a minute
 * and 3.5 GB to compile.
 *
 * Persistent warp-specialized pingpong kernel, tile 128x192x64, no cluster: the best of 57 measured
 * shapes at 384 and at 768 rows per expert. Only the fixed widths must be multiples of 8; rows of
 * an expert may be any number, also as the inner dimension. A group of size (0,0,0) is passed over.
 * Layout tags are passed as pointers (RowMajor *), which is what makes strides differ by group.
 */
#ifndef MIMO_CUDA_GROUPED_CUTLASS_CUH
#define MIMO_CUDA_GROUPED_CUTLASS_CUH

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include "grouped.h"

using grouped_row = cutlass::layout::RowMajor;
using grouped_column = cutlass::layout::ColumnMajor;

/* ElementC is the type of a matrix read with D's shape, or void; Fusion is what makes D of it and
 * of the fp32 product. */
template <class LayoutA, class LayoutB, class ElementC, class ElementD, class Fusion>
struct grouped_gemm {
    using Element = cutlass::bfloat16_t;
    using TileShape = cute::Shape<cute::Int<GROUPED_TILE_M>, cute::Int<GROUPED_TILE_N>, cute::_64>;
    using ClusterShape = cute::Shape<cute::_1, cute::_1, cute::_1>;
    static constexpr int align = 128 / cutlass::sizeof_bits<Element>::value;
    static constexpr int align_d = 128 / cutlass::sizeof_bits<ElementD>::value;

    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, ElementC, grouped_row *,
        align_d, ElementD, grouped_row *, align_d,
        cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong, Fusion>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA *, align, Element,
        LayoutB *, align, float, TileShape, ClusterShape,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong>::CollectiveOp;
    using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    /* grouped.cu fills these arrays without knowing CUTLASS's types. */
    static_assert(sizeof(typename ProblemShape::UnderlyingProblemShape) == sizeof(int[3]));
    static_assert(sizeof(typename Kernel::InternalStrideA) == sizeof(int64_t));
    static_assert(sizeof(typename Kernel::InternalStrideB) == sizeof(int64_t));
    static_assert(sizeof(typename Kernel::InternalStrideD) == sizeof(int64_t));

    static void run(const struct grouped *g, typename Epilogue::FusionCallbacks::Arguments fusion)
    {
        typename Gemm::Arguments args{};
        args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
        args.problem_shape = { g->groups, (typename ProblemShape::UnderlyingProblemShape *)g->size,
                               nullptr };
        args.mainloop = { (const Element **)g->a, (typename Kernel::InternalStrideA *)g->lda,
                          (const Element **)g->b, (typename Kernel::InternalStrideB *)g->ldb };
        args.epilogue.thread = fusion;
        if constexpr (!cute::is_void_v<ElementC>)
            args.epilogue.ptr_C = (const ElementC **)g->c;
        args.epilogue.dC = (typename Kernel::InternalStrideC *)g->ldc;
        args.epilogue.ptr_D = (ElementD **)g->d;
        args.epilogue.dD = (typename Kernel::InternalStrideD *)g->ldd;
        args.hw_info.sm_count = g->sm_count;
        args.scheduler.raster_order = Kernel::TileScheduler::RasterOrderOptions::AlongM;
        Gemm gemm;
        if (Gemm::get_workspace_size(args) > g->workspace_bytes ||
            gemm.initialize(args, g->workspace, g->stream) != cutlass::Status::kSuccess ||
            gemm.run(g->stream) != cutlass::Status::kSuccess)
            cuda_grouped_refused(g);
    }
};

/* D = product + beta C. */
template <class ElementC, class ElementD>
using grouped_sum = cutlass::epilogue::fusion::LinearCombination<ElementD, float, ElementC, float>;

#endif
