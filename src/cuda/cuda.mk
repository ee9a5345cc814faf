# The CUDA part of the Makefile: kernels by nvcc, what only calls libraries by the host compilers. Empty CUDA_HOME: none of it.
CUDA_C   = src/cuda/sizes.c $(if $(CUDA_HOME),$(filter-out src/cuda/none.c src/cuda/sizes.c,$(wildcard src/cuda/*.c)),src/cuda/none.c)
CUDA_CU  = $(if $(CUDA_HOME),$(wildcard src/cuda/*.cu) $(wildcard src/cuda/*.cpp))
CUDA_OBJ = $(patsubst src/%,$(BUILD)/%.o,$(basename $(CUDA_CU)))
CUDA_INC   = -isystem $(CUDA_HOME)/include -isystem $(CUBLAS_HOME)/include -isystem $(NCCL_HOME)/include -isystem $(CUDNN_HOME)/include \
             $(if $(CUTLASS_INC),-isystem $(CUTLASS_INC)) $(if $(CUDNN_FRONTEND_INC),-isystem $(CUDNN_FRONTEND_INC))
CUDA_LIBS  = -L$(CUBLAS_HOME)/lib -L$(NCCL_HOME)/lib -L$(CUDNN_HOME)/lib -L$(CUDA_HOME)/lib64 -L$(CUDA_HOME)/lib \
             -l:libcublasLt.so.13 -l:libnccl.so.2 -l:libcudnn.so.9 -l:libnvrtc.so.13 -l:libcudart.so.13 -lstdc++
NVCCFLAGS  = -std=c++17 -O3 $(NVCC_ARCH) --expt-relaxed-constexpr --expt-extended-lambda -lineinfo -DNDEBUG '-D_Noreturn=[[noreturn]]' -Isrc -Isrc/cuda \
             --Werror all-warnings -Xcompiler -Wall,-Wextra,-Wno-unused-parameter,-Wno-missing-field-initializers -MMD -MP
CXXFLAGS   = -std=c++17 -O1 '-D_Noreturn=[[noreturn]]' $(HARDEN) -Wall -Wextra -Werror -Wno-unused-parameter -Isrc -Isrc/cuda -MMD -MP

$(BUILD)/cuda/%.o: src/cuda/%.cu
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) $(CUDA_INC) -c -o $@ $<

$(BUILD)/cuda/%.o: src/cuda/%.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(CUDA_INC) -c -o $@ $<

$(BUILD)/cuda/%.o: CFLAGS += $(if $(CUDA_HOME),$(CUDA_INC))

# What tools/bootstrap.sh --cuda has fetched; the compiler too, where the machine has none.
CUDA_HERE = CUDA_HOME=$(if $(wildcard /usr/local/cuda/bin/nvcc),/usr/local/cuda,.cuda/nvidia/cu13) CUBLAS_HOME=.cuda/nvidia/cu13 NCCL_HOME=.cuda/nvidia/nccl CUDNN_HOME=.cuda/nvidia/cudnn \
            CUTLASS_INC=.cuda/cutlass_library/source/include CUDNN_FRONTEND_INC=.cuda/include


# Shadow tests on a GPU (tests/gpu): programs without MPI and HDF5, each linked with the kernels it names here and the reference.
# `make gpu-tests T=name` builds one.
GPU_NEEDS_memory    = memory
GPU_NEEDS_loss      = loss optim vision memory
GPU_NEEDS_mamba     = mamba ssd ssd_mma memory
GPU_NEEDS_moe       = moe
GPU_NEEDS_grouped   = grouped grouped_nt grouped_nn grouped_tn grouped_nt_act grouped_nn_act moe gemm dense
GPU_NEEDS_attention = attention attention_cudnn memory
GPU_NEEDS_gemm      = gemm dense
GPU_NEEDS_dense     = dense
GPU_NEEDS_rows      = rows
GPU_NEEDS_shadow    = $(basename $(notdir $(CUDA_CU))) gemm backend_cuda
$(BUILD)/tests/gpu_shadow: $(addprefix $(BUILD)/,backend_shadow.o backend_shadow_layers.o shadow.o shadow_choice.o)

GPU_TESTS = $(if $(T),$(BUILD)/tests/gpu_$(T),$(patsubst tests/gpu/%.c,$(BUILD)/tests/%,$(filter-out tests/gpu/gpu_check.c,$(wildcard tests/gpu/gpu_*.c))))
GPU_BASE  = $(addprefix $(BUILD)/,gpu_check.o tensor.o check.o log.o rng.o cuda/sizes.o cuda/staging.o ref/backend_ref.o) \
            $(REF:src/ref/%.c=$(BUILD)/ref/%_f32.o) $(REF:src/ref/%.c=$(BUILD)/ref/%_f64.o)

# The whole program's library: MPI and HDF5 come from the bundle.
$(BUILD)/tests/gpu_graph $(BUILD)/tests/gpu_timer: $(BUILD)/tests/%: tests/gpu/%.c $(BUILD)/libmimo.a
	@mkdir -p $(@D)
	$(MPICC) $(CFLAGS) $(CUDA_INC) -Isrc/cuda $(LDFLAGS) -Wl,-rpath,'$$ORIGIN' -o $@ $< $(BUILD)/yield.o $(BUILD)/libmimo.a $(LIBS)

$(BUILD)/gpu_%.o: tests/gpu/gpu_%.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(CUDA_INC) -Isrc/cuda -c -o $@ $<

.SECONDEXPANSION:
$(BUILD)/tests/gpu_%: tests/gpu/gpu_%.c $$(GPU_BASE) $$(addprefix $(BUILD)/cuda/,$$(addsuffix .o,$$(GPU_NEEDS_$$*)))
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(CUDA_INC) -Isrc/cuda $(LDFLAGS) -Wl,-rpath,'$$ORIGIN' -o $@ $(filter %.c %.o,$^) $(CUDA_LIBS) $(BLAS_LIBS) -l:libxxhash.a -lm
