#!/bin/sh
# From raw tilt series to a subtomogram average of particles that look like a known map.
# To be run in the project's folder; TS_01.mrc, its .mdoc and its .rawtlt are in raw/.
set -eu

emc_import raw/TS_01.mrc raw/TS_02.mrc --dose 3.1
emc_tomogram --all --align-only
emc_tomoctf --all
emc_tomogram --all --load --bin 8 --ctf wiener --lowpass 60        # to look at
emc_tempmatch --all --template emd_3228.mrc --label ribo           # or emc_import --picks picks.star --label ribo TS_01

emc_extract --all --label ribo --set ribo --box 96 --bin 2
emc_volume emd_3228.mrc reference.mrc --pixel-size 5.4 --box 96 --lowpass 60
emc_refine ribo --reference reference.mrc --startres 60 --path spt_00

emc_mask spt_00/average.mrc --output mask.mrc
emc_refine spt_00 --reference spt_00/average.mrc --local --startres 30 --mask mask.mrc --path spt_01
emc_tomocpr spt_01 --path cpr_00                                   # the tilt series, from their particles
emc_subtilt cpr_00 --path sub_00                                   # and each image by itself
emc_fsc sub_00/half1.mrc sub_00/half2.mrc --mask mask.mrc --output fsc

emc_pca sub_00 --mask mask.mrc --path pca_00                       # how they differ
emc_cluster pca_00                                                 # which are alike
emc_mapback pca_00                                                 # and where they are
emc_select pca_00 --class 1 --set best
emc_refine best --reference pca_00/class_1.mrc --local --startres 20 --mask mask.mrc --path spt_02
emc_average spt_02 --mask mask.mrc --bfactor=-50,-100,auto --path final

emc_export spt_02 --format relion31
emc_info final/average.mrc --replay > again.sh                     # all of the above that went into the map
