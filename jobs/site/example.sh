# Modules and environment of one site; copy to <name>.sh and set MIMO_SITE=<name>.
#   module load mpich hdf5-parallel cuda nccl cudnn
export HWLOC_PLUGINS_PATH=/nonexistent   # no display or OpenCL plug-ins at start-up
