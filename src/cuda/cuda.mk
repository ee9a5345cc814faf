# The CUDA part of the Makefile: kernels by nvcc, what only calls libraries by the host compilers. Empty CUDA_HOME: none of it.
CUDA_C   = src/cuda/sizes.c $(if $(CUDA_HOME),$(filter-out src/cuda/none.c src/cuda/sizes.c,$(wildcard src/cuda/*.c)),src/cuda/none.c)
CUDA_CU  = $(if $(CUDA_HOME),$(wildcard src/cuda/*.cu) $(wildcard src/cuda/*.cpp))
CUDA_OBJ = $(patsubst src/%,$(BUILD)/%.o,$(basename $(CUDA_CU)))
CUDA_INC   = -isystem $(CUDA_HOME)/include -isystem $(CUBLAS_HOME)/include -isystem $(NCCL_HOME)/include -isystem $(CUDNN_HOME)/include \
             $(if $(CUTLASS_INC),-isystem $(CUTLASS_INC)) $(if $(CUDNN_FRONTEND_INC),-isystem $(CUDNN_FRONTEND_INC))
CUDA_LIBS  = -L$(CUBLAS_HOME)/lib -L$(NCCL_HOME)/lib -L$(CUDNN_HOME)/lib -L$(CUDA_HOME)/lib64 \
             -l:libcublasLt.so.13 -l:libnccl.so.2 -l:libcudnn.so.9 -lcudart -lstdc++
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

CUDA_HERE = CUDA_HOME=/usr/local/cuda CUBLAS_HOME=.cuda/nvidia/cu13 NCCL_HOME=.cuda/nvidia/nccl CUDNN_HOME=.cuda/nvidia/cudnn \
            CUTLASS_INC=.cuda/cutlass_library/source/include CUDNN_FRONTEND_INC=.cuda/include

