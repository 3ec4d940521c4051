// One pass over x fills a table of moments, from which all statistics are merged.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "cpu/bn_stats.h"

namespace clusterq::bn_stats {

// Moments of segments of x: mean and centered squares per segment and channel, in double. A segment is an image, a part
// of one, or `group` images.
struct Table {
  int64_t segments, channels;
  int64_t parts;   // per image
  int64_t length;  // positions per segment, the last may have fewer
  std::unique_ptr<double[]> mean, m2;

  Table(const View& x, int64_t parts_per_image)
      : segments(x.images * parts_per_image),
        channels(x.channels),
        parts(parts_per_image),
        length(ceil_div(x.spatial, parts_per_image)),
        mean(new double[segments * channels]),
        m2(new double[segments * channels]) {}

  int64_t begin(int64_t segment) const { return segment % parts * length; }
  int64_t count(int64_t segment, int64_t spatial) const {
    return std::max<int64_t>(0, std::min(length, spatial - begin(segment)));
  }
};

// The table of x with `parts` segments per image; y = BatchNorm of x where asked.
Table moments(const View& x, int64_t parts, const Tensor* y, const Parameters* parameters);

// y alone, of x with channels innermost.
void normalize_rows(const View& x, const Tensor& y, const Parameters& parameters);

// Images whose planes are one segment of `grouped_moments`, which wants planes of at least 16 elements and more images
// than one per segment; 1 where it does not suit x.
int64_t images_per_group(const View& x);

// Segments are groups of images: for batch statistics of small planes, where each plane has sums of its own no more.
// `mean` and `m2` are those of all images then: segments merged in order.
Table grouped_moments(const View& x, int64_t group, const Tensor* y, const Parameters* parameters);

}  // namespace clusterq::bn_stats
