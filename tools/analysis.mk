# Programs that read or watch the source: each target ends with status 0 only without findings. Included by Makefile.
# What is not looked at, and why, is in .clang-tidy and tools/cppcheck.suppress.

.PHONY: lint-deep tidy cppcheck valgrind
lint-deep: cppcheck tidy valgrind  ## cppcheck, tidy and valgrind

cppcheck: all                      ## cppcheck over src/
	$(PYTHON) tests/check_lint.py -k cppcheck

# One file at a time, again only after what it includes has changed: a stamp is as old as its object file.
TIDY = $(patsubst src/%.c,$(BUILD)/tidy/%,src/main.c $(SRC)) $(REF:src/ref/%.c=$(BUILD)/tidy/ref/%_f32)
tidy: $(TIDY)                      ## clang-tidy over src/
TIDY_FLAGS = $$($(MPICC) -compile_info | tr ' ' '\n' | grep '^-[ID]') $(filter-out -M%,$(CFLAGS))
$(BUILD)/tidy/%: $(BUILD)/%.o .clang-tidy
	@mkdir -p $(@D)
	clang-tidy --quiet src/$*.c -- $(TIDY_FLAGS) $(CFLAGS_$*) && touch $@
$(BUILD)/tidy/ref/%_f32: $(BUILD)/ref/%_f32.o .clang-tidy
	@mkdir -p $(@D)
	clang-tidy --quiet src/ref/$*.c -- $(TIDY_FLAGS) -Dreal=float -Dref_suffix=f32 && touch $@

# One rank, a tiny model: two iterations from generated samples with validation and a checkpoint, then the resumed rest.
# Valgrind cannot execute AVX-512.
MEMCHECK = OPENBLAS_NUM_THREADS=1 OPENBLAS_CORETYPE=Haswell HWLOC_PLUGINS_PATH=/nonexistent UCX_TLS=self,posix \
    valgrind --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite --quiet
MEMCHECK_RUN = ./mimo input/mock_tiny.nml run.output_dir=$(BUILD)/valgrind batch.global_batch_size=2 checkpoint.save=$(BUILD)/valgrind/ckpt \
    eval.eval_iters=1 eval.eval_picture_ablation=rotate log.tensorboard_dir=$(BUILD)/valgrind/board log.dump_batches=1
valgrind: all                      ## memcheck of a short run on one rank
	rm -rf $(BUILD)/valgrind
	$(MEMCHECK) $(MEMCHECK_RUN) run.train_iters=3 run.exit_interval=2 || [ $$? -eq 75 ]
	$(MEMCHECK) $(MEMCHECK_RUN) run.train_iters=3
	$(MEMCHECK) ./mimo --check input/mock_tiny.nml > /dev/null
	$(MEMCHECK) ./mimo --inspect $(BUILD)/valgrind/trace.h5 > /dev/null
