# Rules only, no probing: what a site sets is in Makefile.inc. `make help` lists the targets.
include Makefile.inc

# Named here: rules of the included files come before `all`.
.DEFAULT_GOAL = all
BUILD  ?= build
SAN    ?= 0
WARN    = -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wno-unused-parameter
HARDEN  = -D_FORTIFY_SOURCE=2 -fstack-protector-strong
SANFLAGS_1 = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
OPT_0   = $(OPT) $(HARDEN)
OPT_1   = -O1 $(SANFLAGS_1)
SANFLAGS_2 = $(SANFLAGS_1) -fsanitize=fuzzer-no-link -fprofile-instr-generate -fcoverage-mapping
OPT_2   = -O1 $(SANFLAGS_2)
VERSION = 0.1.0
GIT    := $(shell git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)

CFLAGS  = -std=c11 -D_GNU_SOURCE $(ARCH) $(OPT_$(SAN)) -fno-math-errno $(WARN) -Isrc -MMD -MP $(HDF5_CFLAGS) $(BLAS_CFLAGS)
LIBS    = $(HDF5_LIBS) $(BLAS_LIBS) -ljpeg -lpng16 -lwebp -lpcre2-8 -ljansson -larchive -lxxhash -lm -ldl $(if $(CUDA_HOME),$(CUDA_LIBS))
LDFLAGS = $(SANFLAGS_$(SAN)) -Wl,--as-needed

include src/cuda/cuda.mk
SRC     = $(filter-out src/main.c,$(wildcard src/*.c)) src/ref/backend_ref.c $(CUDA_C)
REF     = $(filter-out src/ref/backend_ref.c,$(wildcard src/ref/*.c))
OBJ     = $(SRC:src/%.c=$(BUILD)/%.o) $(CUDA_OBJ) $(REF:src/ref/%.c=$(BUILD)/ref/%_f32.o) $(REF:src/ref/%.c=$(BUILD)/ref/%_f64.o)
TESTS   = $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c) $(wildcard tests/mpi_*.c) tests/bench_yardstick.c)
FUZZERS = $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/fuzz_*.c))
BIN     = $(if $(filter build,$(BUILD)),mimo,$(BUILD)/mimo)

.PHONY: FORCE all help cuda bundle check-gpu bench gpu-tests gpu-programs fuzz fuzzers check regression oracle oracle-hf mutants demo data lint format clean tests bench-cpu man install
.SECONDARY:
all: $(BIN)                        ## build ./mimo (the default)

help:                              ## this list
	@grep -hE '^[a-z-]+:.*##' $(filter-out %.d,$(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(BIN): $(BUILD)/main.o $(BUILD)/libmimo.a
	$(MPICC) $(LDFLAGS) -o $@ $(BUILD)/main.o $(BUILD)/yield.o $(BUILD)/libmimo.a $(LIBS)

$(BUILD)/libmimo.a: $(OBJ)
	@rm -f $@
	ar rcs $@ $(OBJ)

$(BUILD)/%.o: src/%.c
	@mkdir -p $(@D)
	$(MPICC) $(CFLAGS) $(CFLAGS_$*) -c -o $@ $<

$(BUILD)/ref/%_f32.o: src/ref/%.c
	@mkdir -p $(@D)
	$(MPICC) $(CFLAGS) -Dreal=float -Dref_suffix=f32 -c -o $@ $<

$(BUILD)/ref/%_f64.o: src/ref/%.c
	@mkdir -p $(@D)
	$(MPICC) $(CFLAGS) -Dreal=double -Dref_suffix=f64 -c -o $@ $<

# What the header prints of the build; rewritten only when it changes.
CFLAGS_code = -DMIMO_VERSION='"$(VERSION)"' -DMIMO_GIT='"$(GIT)"' -DMIMO_CFLAGS='"$(ARCH) $(OPT_$(SAN))"'
$(BUILD)/code.o: $(BUILD)/git.stamp
$(BUILD)/git.stamp: FORCE
	@mkdir -p $(@D); echo '$(VERSION) $(GIT)' | cmp -s - $@ || echo '$(VERSION) $(GIT)' > $@
FORCE:

$(BUILD)/tests/fuzz_%: LDFLAGS += -fsanitize=fuzzer
$(BUILD)/tests/%: tests/%.c $(BUILD)/libmimo.a
	@mkdir -p $(@D)
	$(MPICC) $(CFLAGS) -Itests $(LDFLAGS) -o $@ $< $(BUILD)/yield.o $(BUILD)/libmimo.a $(LIBS) -lcmocka

tests: $(TESTS)                    ## build every test binary

fuzzers: $(FUZZERS)
fuzz: all                          ## fuzz what reads foreign bytes; SECONDS=600 for each target, K=word chooses
	$(PYTHON) tests/check_fuzz.py --mimo ./mimo $(if $(SECONDS),--seconds $(SECONDS)) $(if $(K),-k $(K))

data: data/demo/train              ## make the demo's pictures, texts and tokenizer in data/demo
data/demo/train: tools/make_shards.py
	$(PYTHON) tools/make_shards.py --out data/demo
	@touch $@

cuda:                              ## build build/gpu/mimo with CUDA's libraries from .cuda
	$(MAKE) BUILD=build/gpu $(CUDA_HERE) build/gpu/mimo

bundle: cuda gpu-tests             ## build/bundle: a tree that runs on a GPU host without MPI and HDF5
	tools/bundle.sh build/gpu/mimo build/bundle $(patsubst tests/gpu/%.c,build/gpu/tests/%,$(filter-out %gpu_check.c,$(wildcard tests/gpu/gpu_*.c)))

GPUS = 1
OUT  = run/gpu
check-gpu: bundle                  ## on a GPU host: every test there; GPUS=1,2,4 counts of GPUs, results into OUT=run/gpu
	build/bundle/check_gpu --gpus $(GPUS) --out $(OUT)

bench: bundle                      ## on a GPU host: measure operations and runs; GPUS=1,2,4, OUT=run/gpu
	build/bundle/bench_gpu --gpus $(GPUS) --out $(OUT)

gpu-tests:                         ## build the tests that run on a GPU host: build/gpu/tests/gpu_*
	$(MAKE) BUILD=build/gpu $(CUDA_HERE) gpu-programs
gpu-programs: $(GPU_TESTS)

demo:                              ## install, build, make the data, train on 8 ranks, show the result
	tools/demo.sh

check:                             ## install what is missing, run every test; the last line counts them
	tools/bootstrap.sh --dev
	$(MAKE) all tests
	$(MAKE) BUILD=build/clang CC=clang MPICC="mpicc.mpich -cc=clang" build/clang/mimo
	$(MAKE) BUILD=build/asan SAN=1 tests build/asan/mimo
	tests/run --build build --mimo ./mimo --asan build/asan --mpiexec $(MPIEXEC) --python $(PYTHON)

regression: all tests                  ## one trace on every layout, and bitwise restarts; K=word chooses
	regression/run --mimo ./mimo --mpiexec $(MPIEXEC) $(if $(K),-k $(K))

oracle: all build/tests/test_tokenizer                   ## make the references of transformers and torch again; K=word chooses
	@test -n "$(ORACLE_PYTHON)" || tools/bootstrap.sh --oracle
	$(or $(ORACLE_PYTHON),.oracle/bin/python) regression/oracle/oracle.py --mimo ./mimo --mpiexec $(MPIEXEC) $(if $(K),-k $(K))
	$(if $(K),,$(or $(ORACLE_PYTHON),.oracle/bin/python) regression/oracle/tokenizer_oracle.py build/tests/test_tokenizer)

mutants: all                       ## plant errors one by one; a regression case must see each; K=word chooses
	regression/mutate --make "$(MAKE)" --mpiexec $(MPIEXEC) $(if $(K),-k $(K))

oracle-hf: all                     ## compare import, export and fine-tuning of Hugging Face models with transformers
	@test -n "$(ORACLE_PYTHON)" || tools/bootstrap.sh --oracle
	for p in "import_export.py" "finetune.py check"; do $(or $(ORACLE_PYTHON),.oracle/bin/python) regression/oracle/$$p --mpiexec $(MPIEXEC) || exit 1; done

lint: all                          ## the rules of the source tree
	$(PYTHON) tests/check_lint.py

bench-cpu: all build/tests/bench_gemm build/tests/test_schedule   ## speed on this machine; PEER='command' compares
	$(PYTHON) tools/bench_cpu.py --mimo ./mimo --mpiexec $(MPIEXEC) --peer "$(PEER)" --peer-lm "$(PEER_LM)"

include tools/analysis.mk

man: build/mimo.1                  ## the manual page, build/mimo.1
build/mimo.1: all
	./mimo --man > $@

PREFIX = /usr/local
install: all man                   ## program, manual, decks and documents below PREFIX (/usr/local)
	install -D -m 755 mimo $(DESTDIR)$(PREFIX)/bin/mimo
	install -D -m 644 build/mimo.1 $(DESTDIR)$(PREFIX)/share/man/man1/mimo.1
	install -d $(DESTDIR)$(PREFIX)/share/doc/mimo/input $(DESTDIR)$(PREFIX)/share/doc/mimo/docs
	install -m 644 README.md LICENSE CITATION.cff $(DESTDIR)$(PREFIX)/share/doc/mimo
	install -m 644 input/*.nml $(DESTDIR)$(PREFIX)/share/doc/mimo/input
	install -m 644 docs/* $(DESTDIR)$(PREFIX)/share/doc/mimo/docs

format:                            ## clang-format every source file in place
	clang-format -i $(wildcard $(foreach d,src src/ref src/cuda tests tests/gpu,$(addprefix $d/*.,c h cu cuh cpp)))


clean:                             ## remove what was built (not run/ and data/)
	rm -rf build mimo

-include $(wildcard $(BUILD)/*.d $(BUILD)/ref/*.d $(BUILD)/cuda/*.d $(BUILD)/tests/*.d)
