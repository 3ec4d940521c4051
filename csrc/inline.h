// The one spelling of a helper that has to vanish into its caller.
#pragma once

#if defined(__CUDACC__)
#define CLUSTERQ_INLINE __host__ __device__ __forceinline__
#else
// A plain `inline` helper is compiled for the portable instruction set, whatever its caller is compiled for.
#define CLUSTERQ_INLINE inline __attribute__((always_inline))
#endif
