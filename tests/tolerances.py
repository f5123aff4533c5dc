"""Every tolerance of the suite with its derivation: tests import `TOL` and state no number."""

TOL: dict[str, float] = {
    # Reference attention in float32 at HIGHEST precision, unit-normal values of order 1: logits of
    # 16..64 products err by ~8 eps, softmax weights by as much relative, sums of <= 300 terms with
    # sum(p) = 1 by ~4 eps: about 20 * 1.2e-7 * max|v| (4) = 1e-5.
    "attention_f32": 1e-5,
    # Packed attention against float64 after identical quantization: float32 logits up to ~8 from
    # two orders of summation (folded query in the rotated basis, 16 products, ~16 eps each way):
    # 8 * 32 * 6e-8 = 1.5e-5 relative on p, times max|v| ~ 4, sum(p) = 1: 6e-5.
    "packed_attention": 6e-5,
    # Queries as 16-bit integers of |q| |column| ~ 10: unit 3e-4, over sqrt(72) bits of +-1/2 at
    # 0.29 units each, gain 2, scale 0.3: 2.2e-4 on a logit, as much relative on p, times |v| ~ 2.
    "columns": 5e-4,
    # The same over the 256 bits of six units: twice the sum of as many roundings.
    "columns_joined": 1e-3,
    # Queries and keys as pairs of bfloat16, each off by 2^-16 at most, of |q| |k| scale ~ 5 * 8 *
    # 0.3: 24 channels err apart, 12 * 2 * 1.5e-5 / sqrt(6) = 1.5e-4 on a logit, as much relative
    # on p, times |v| ~ 2. Bits of keys, off by 1/65278 of the largest at most, add a tenth.
    "columns_decoded": 3e-4,
    # Queries as pairs of int8 of |q| |column| ~ 10: 10 / (127 508) / sqrt(3) = 9e-5 each, over
    # sqrt(72) bits of +-1/2, scale 0.3: 1.1e-4 on a logit, as much relative on p; averaged over
    # the tokens that share a softmax (40 and 530, as if 10) 4e-5, times |v| ~ 2. Weights likewise,
    # up to 8 / (127 508) of a page's largest: 1.2e-4 / 10.
    "columns_triton": 1e-4,
    # The same without an average, gain 2: 2.2e-4 on a logit, 3.2e-4 on the difference of two; of
    # two tokens that share a softmax a quarter of it on p, times |v - v'| ~ 4: four deviations.
    "columns_triton_few": 1.3e-3,
    # A logit of a key decoded by float16, of |q| |k|: a unit's gain off by up to 2^-11, its columns
    # and the key at random by 2^-11 / sqrt(3) each over sqrt(24) channels, 6e-5, cosines by 2^-16.
    "decoded_key": 6e-4,
    # Attention to such keys, |q| |k| scale ~ 6, half of that off: 1.8e-3 on a logit, as much
    # relative on p; averaged over the tokens that share a softmax (as if 10) 6e-4, times |v| ~ 2.
    "columns_decoded_float16": 1.2e-3,
    # Mean of 65,536 squared errors in float32, summed in any order: 1e-6; where that decides
    # between two paths they leave as much; seven digits are committed.
    "distortion_curve": 2e-6,
    # One query folded, of |q| |column|: split products 4.8e-7, a rotation by float32 cosines (three
    # roundings of a pair, 6e-8 each); as a pair of int8 besides half of 1 / (127 254), 1.55e-5.
    "folded_query": 2e-6,
    "folded_pair": 1.7e-5,
    # Tiny decoders of 2-5 layers against transformers in float32: residual stream of order 1..5,
    # ~10 rounded sums of 28..48 products per layer, each ~4 eps of its size: 50 * 4 * 6e-8 = 1.2e-5
    # (the largest seen: 1.04e-5 of qwen3_next on a CPU that adds 16 numbers at a time).
    "model_golden": 1.2e-5,
    # Rotary frequencies computed in float64 and rounded once to float32: half an ulp, 6e-8.
    "rope_frequency": 6e-8,
    # Rotation at positions <= 300 against float64: the float32 product position * frequency errs by
    # half an ulp of 300, 1.5e-5, times |pair| <= 5, and cos, sin and three roundings: 8e-5.
    "rope_rotate": 1e-4,
    # Turned and turned back by the same float32 cos and sin: c^2 + s^2 = 1 within 2 eps, six
    # roundings of 6e-8 on values <= 5.
    "rope_inverse": 2e-6,
    # SmolLM2-135M, 30 layers, logits up to 40, against transformers: ~20 roundings of 2 eps per
    # layer add as random errors, sqrt(30 * 20) * 1.2e-7 = 3e-6 relative, times 40: 1.2e-4.
    "embedded_logits": 1.2e-4,
    # Perplexity of one passage: the same logits' error, averaged over its tokens, relative.
    "embedded_perplexity": 1e-4,
    # Gemma 3 270M's, given with five digits by transformers in float32.
    "gemma_perplexity": 2e-4,
    # float64 sums of <= 640 terms below 50: 640 * 50 * 1.1e-16, three times over.
    "float64_sums": 1e-11,
    # float64 products of <= 512 terms of unit vectors: 512 * 1.1e-16, with room for the DCT.
    "orthogonal_f64": 1e-13,
    # QR against Gram-Schmidt of a 64x64 normal matrix: condition number below 1e4, times 1e-16.
    "haar_f64": 1e-11,
    # float32 product of <= 256 unit-normal coordinates (up to 5) with an orthogonal row: blocked
    # sums err by ~16 * 6e-8 * |x| (<= 20): 2e-5 in the worst entry; twice for inverses.
    "rotate_f32": 4e-5,
    # scipy.special.ndtri is documented to a few ulp; 1e-14 allows another implementation of it.
    "golden_normal": 1e-14,
    # Haar moments over 4 * 128^2 entries: sd of r^4 d(d+2)/3 is ~3.3, / 256 = 0.013; times 4.
    "haar_fourth_moment": 0.05,
    # sqrt(d) times a mean of 512 diagonal entries of variance 1/d: sd 1/sqrt(512) = 0.044; times 4.
    "haar_trace": 0.18,
    # Scale factors from float32 sums of 64 squares: 64 * 6e-8 at worst, in numerator and root.
    "scale_f32": 4e-6,
    # Root-mean-square of <= 256 float32 values: products, a sum, a root, a division.
    "unit_f32": 2e-6,
    # Monte-Carlo agreement: a correct value misses by more than 4 standard errors once in 16,000.
    "standard_errors": 4.0,
    # Finite-D deviation of matched and unbiased errors from their limits, relative: simulated 1 to
    # 3 % at D=128 for 1 to 4 bits, that is at most 4 / D.
    "rule_limit_times_dim": 4.0,
    # The golden constants carry 9 decimals of an optimum known to 1e-7; the issue asks for 1e-6.
    "golden_codebook": 1e-7,
    # Centroid minus cell mean, both near 1: quadrature to 1e-12 over cell masses above 1e-3; Newton
    # ends in noise of 1e-11.
    "fixed_point": 1e-8,
    # Sums of a few quadratures with absolute error 1e-13.
    "quadrature": 1e-10,
    # float32 thresholds of order 1 against float64 distances: two roundings of 6e-8, times 8.
    "tie_f32": 1e-6,
    # float64 prefix sums of 40 terms, values up to 1e4 with spread 1: 40 * 1e-16 * 1e8 relative.
    "kmeans_error": 1e-6,
    # A threshold misplaced by at most h/2 = 5e-4 (16384 bins on [-8, 8]) costs f(t) gap (h/2)^2 per
    # threshold: below 1e-6 of D. Samples: 4 centroids fitted on 2e5 samples lose ~4 / 2e5. 0.5 % is
    # the limit.
    "histogram_excess": 5e-3,
    # d Var of prod: the published forms drop the residual's component along the query (1/D, up to
    # 2 % at D=64) and differ from the exact ones by O(1/D); 5 % is the accuracy asked for.
    "prod_variance": 0.05,
    # One fixed Gaussian S: |S^T z|^2 / D^2 has sd ~ sqrt(2) / D from tr(S S^T), as much again from
    # its off-diagonal part; 4 sd of both, relative, times D.
    "sketch_spread_times_dim": 8.0,
    # Distance of u (unit rms, up to ~5) from a threshold below which float32 rotation may flip a
    # code: the "rotate_f32" bound on mean-removed data (mean up to 80 * 6e-8 / 0.25 added).
    "code_margin": 8e-5,
    # Share of coordinates within code_margin of any of <= 255 thresholds: 2 * 8e-5 / spacing, mean
    # spacing 6 / 256 at 8 bits: 0.7 %; at <= 4 bits below 0.1 %.
    "unclear_share": 0.01,
    # decode in float32: rotation of values of size max|x_hat| plus the scale product.
    "decode_f32": 8e-6,
    # float32 products of 64..1024 terms in two orders (rotated basis and plain), relative to the
    # product of norms, the mean included: ~40 eps.
    "product_f32": 5e-6,
    # Mean squared errors of 2048 vectors of >= 64 coordinates: relative sd ~ 0.4 %, times 4.
    "shannon_slack": 0.016,
    # One stored float16 (2^-11) or bfloat16 (2^-8) rounding of the scale, squared where norms are.
    "rule_f16": 2.0**-9,
    "rule_bf16": 2.0**-7,
    # A stored scale against its float64 value: float32 arithmetic ("scale_f32"), or half a unit in
    # the last place of the type that holds it (2^-11, 2^-8), plus that.
    "stored_float32": 4e-6,
    "stored_float16": 2.0**-11 + 4e-6,
    "stored_bfloat16": 2.0**-8 + 4e-6,
    # Two float32 roundings of one scale may fall on neighbouring bfloat16 numbers: 2^-7 relative.
    "scale_step": 2.0**-6,
    # 3-bit error over 256 vectors of 128 coordinates: 1.4 / sqrt(32768) = 0.8 %, times 4; the mean
    # of 1000 rounds x by 3e-5, nothing against sqrt(D_b) = 0.18.
    "common_mean": 0.04,
    # 4 standard errors over 16 rotations must resolve the planted-bias factor to a quarter.
    "bias_ratio_resolution": 0.25,
    # log p in float32 of logits within 60 of each other: difference to the maximum 2 eps/2 * 30,
    # the sum of <= 49152 exponentials in vector lanes and its logarithm ~1.5e-6 (seen: 2e-6), so
    # 60 * 6e-8 + 1.5e-6 = 5e-6. One log-ratio d has twice that at worst, and seldom.
    "log_softmax_f32": 5e-6,
    # Sum of <= 49152 non-negative float32 terms in 8 or more lanes: random walk of eps/2 over 6000
    # steps, 80 * 6e-8 = 5e-6 relative; exponentials 2 eps each.
    "kl_sum_f32": 5e-6,
    # x + exp(-x) - 1 by eight terms: the first one dropped is 2 x^6 / 8! = 8e-7, Horner 4 eps/2.
    "kl_series": 1.2e-6,
    # A handful of float32 operations on numbers of order 1 to 1e4: 8 eps.
    "hand_f32": 1e-6,
    # float64 sums of 1000 terms: 1000 * 1.1e-16.
    "f64": 2e-13,
    # Quantiles of 4000 resampled means: 1 / (phi(1.96) sqrt(4000 / 0.025 / 0.975)) = 0.042 sd each,
    # 2 % of 1.96 sd; a mean of 40 normals is normal to ~1 %. Times 4.
    "bootstrap_width": 0.12,
    # Float64 arithmetic of at most a few hundred terms: 1000 * 2^-53.
    "float64": 1.2e-13,
    # Sums of 256-token blocks, 3 blocks, in float32: (256 + 3 + 3) * 2^-24 (reduce.moments).
    "moments_block": 1.6e-5,
    # Float32 mean of 600 numbers by pairwise or sequential sums: 600 * 2^-24 of their size.
    "float32_mean": 3.6e-5,
    # A covariance from the above, relative to std * std: typical float32 rounding of 600 terms
    # (sqrt(600) * 2^-24 = 1.5e-6) times 4 for heavy tails, plus 2^-52 * 1e5^2 * 4 = 9e-6 for the
    # float64 subtraction of a mean 1e5 times a small channel's std.
    "covariance": 2e-5,
    # A float32 norm near a bin edge may be counted one bin on: one ulp of the norm.
    "float32_norm": 1.2e-6,
    # The limit on what a codebook from a histogram may lose against the full sample.
    "histogram_fit": 5e-3,
    # KL of a tiny model from two compilations of the same sums: logits of order 10 err by the
    # "model_golden" bound e, so the KL by e sqrt(2 KL) (5e-5 relative at KL = 0.1) and e^2.
    "kl_model_rel": 2e-4,
    "kl_model_abs": 1e-9,
    # Mean NLL from the same logits: 2 e, and as much relative in the perplexity.
    "model_nll": 2e-5,
    # Through the packed cache, logits err by ~2 layers x "packed_attention" (6e-5) x weights of
    # order 1, and KL of order 0.5 by that times sqrt(2 KL): 1.2e-4, doubled. No code flips.
    "kl_packed": 3e-4,
    # Sums of <= 1e3 float32 products of one sign: 30 eps, squares doubled, printed digits 5e-6.
    "head_errors": 2e-5,
    # Float32 activations against transformers' (models agree to 1e-5) and float64 moments.
    "capture_golden": 2e-5,
    # A weight of order 1 through an exponential and back, or as 1 + weight: some roundings.
    "gguf_copy": 1e-6,
    # Outputs of up to 6 of a delta-net or a Mamba-2 mixer in float32, sums of some tens of
    # products: 30 eps of them.
    "delta_net": 2e-5,
    # The same of a sum of some hundreds of gradients, beside differences good to 1e-7.
    "delta_net_gradient": 1e-4,
    # Logits of the same tiny model in two orders of summation: "model_golden" each way.
    "decode_exact": 2e-5,
    # Decoding through packed words against one parallel pass: each of 2 layers adds the attention
    # error "packed_attention" (6e-5) through weights of order 1 to logits, and the model's own.
    "decode_packed": 1.5e-4,
    # Two float64 quotients of the same integers: one rounding each, 2 * 1.1e-16, and room for one.
    "accounting_ratio": 1e-15,
    # (cost - limit) * context in float64: costs rounded to 2.2e-16 with an excess of 1.1e-7 of
    # them at 1e9 tokens, so 4e-9 relative, doubled.
    "accounting_excess": 1e-8,
    # A fitted mean in float32, |mean| up to 30 std of a coordinate: 30 * 2^-24 + the float32 sum.
    "fitted_mean": 2e-5,
    # 640,000 normal coordinates in cells of >= 4 %: a centroid is a mean of >= 25,000 of them, and
    # cell borders move it by as much again: 5 / sqrt(25,000) * 0.35 (cell std) = 1.1e-2.
    "sampled_codebook": 1.2e-2,
    # Its distortion: 5 std of a mean over 640,000 squared errors of relative std ~1.3: 8e-3.
    "sampled_distortion": 1e-2,
    # The best of 1024 bins and ten Lloyd steps against exact k-means of the same coordinates:
    # a threshold within a bin, 1/14 of a cell at 5 bits of two narrow modes, costs (1/14)^2.
    "codebook_by_histogram": 5e-3,
    # Costs from float32 coordinates against the codec's float32 errors: 1e-6 of a unit deviation in
    # errors of 0.2 of it, and now and then one of 300 tokens at a threshold: 1e-4 of its error.
    "fit_cost": 1e-3,
    # Gains are taken over all 16 coordinates, stored ones over those that are coded: a vector's
    # size over so few is known to 1 / sqrt(2 * 16) = 18 %.
    "fit_gain": 0.18,
    # The same of a window code whose gain is searched; without a gain costs are twice and more.
    "fit_searched_gain": 0.4,
    # x near 4096 keeps 2^-12 of absolute precision: against cells of ~0.1 (the 0.5-std head at 3
    # bits), (2^-12 / 0.1)^2 is nothing, but means and thresholds move: 1 %.
    "far_mean": 1e-2,
    # Gaussian code times a scale of float32 rounding: 4 * 2^-24 of the constant.
    "constant_head": 1e-6,
    # One head of a batch against that head alone: sums in another order, ~30 float64 ulp, rounded
    # to float32 (1 ulp, 1.2e-7 relative); of a value near zero, 1e-7 of the largest.
    "fitted_alone": 3e-7,
    "fitted_alone_near_zero": 1e-6,
    # A format that keeps relative steps, or a rotation, fitted to another head: rarely better on a
    # sample of 640 tokens, by less than 2 %.
    "other_scale": 1.02,
    # Quotients (y - minimum) / scale up to 15 steps after a float32 rotation: 4e-5 of the largest
    # |y| is at most 15 * 4e-5 steps; a step further off is decided alike by float32 and float64.
    "affine_steps": 6e-4,
    # Share of quotients within that of a half: 2 * 6e-4, eight times for few values.
    "affine_unclear": 0.01,
    # One candidate scale against the best: float32 mean of ~1e4 squares in blocks, 1e-5 relative.
    "fit_scale_mse": 1e-4,
    # Steps y / s of vLLM's int4, up to 15 of them plus 15: float32 rotation of D <= 256 unit
    # coordinates errs by "rotate_f32" of the rms, s being about rms / 3, and quotients by 30 eps.
    "int4_margin": 1e-4,
    # Its scale without the 4 low mantissa bits: 15 * 2^-23 relative, plus the rotation's 2e-6.
    "int4_scale": 5e-6,
    # vLLM's Lloyd-Max levels: trapezoid of 200 intervals of h in the outer cells (8 sigma wide),
    # slope of the density over mass: h^2/12 * f'/F ~ (0.04)^2 / 12 * 3 = 4e-4, doubled.
    "vllm_trapezoid": 8e-4,
    # Three rounds of float32 stds of 32 values (16 * 6e-8 each), logs up to 10 (10 * 6e-8) and
    # exponentials, each round on the errors of the one before: 3 * 3e-6.
    "balance_f32": 1e-5,
    # iq4_nl: x / d0 up to 127 after two float32 roundings, 127 * 2 * 6e-8, against a midpoint: the
    # nearer of two values wins by twice that; doubled.
    "iq4_nl_midpoint": 6e-5,
    # Its scale in float32, 32 sums of one sign: 32 * 6e-8 relative at worst, and such a share of
    # float16 steps (2^-10) may fall on the other side: 0.2 %, five times for few blocks.
    "iq4_nl_equal_scales": 0.99,
    # Sum of <= 12 squares of errors below 3 in float32, or of 8 products up to 20: 16 * 6e-8 * 20.
    "path_error_f32": 2e-5,
    # Of the least weighted error: a float32 path is chosen by sums of <= 128 squares (8e-6) of
    # errors off by up to 1e-5 steps (|u| <= 20, sums of 9 taps), twice that over 0.3 steps rms.
    "window_error": 2e-4,
    # Vectors whose two searches meet no tie of that size: some 128 choices of density 1 a step.
    "window_equal": 0.95,
    # Error of 15 coordinates beside one at Inf, by that of XLA's codes: 2^-24 of (1e6)^2 stays in
    # common with them, so their costs (some 10 in all) are known to 2^-24 of 6e4, times a few.
    "window_far": 1.05,
    # The limit on the distance from the figures of trellis-coded quantization, in dB.
    "tcq_snr_db": 0.05,
    # Standard errors within which all of <= 32 points are the means of 65536 fresh samples: the
    # cell's own deviation is below 1/2, so 2.5 of these are 5 of its own. The fit's own noise on
    # 1e6 samples is a quarter of that, its digits nothing.
    "cell_means": 2.5,
    # E8 at 2 bits: measured 0.03 dB below the published figure, whose part of the outer shell is
    # unknown (parts differ by 0.03 dB); standard error of 320,000 coordinates 0.015 dB.
    "e8_snr_db": 0.06,
    # Share of vectors whose best point of the part shell is not among the six looked at: 0.2 % seen
    # at unit size; far outside nearly all nearest points lie in that shell.
    "e8_missed": 0.02,
    "e8_missed_far": 0.6,
    # A p-value that a correct program falls below once in 10,000 runs.
    "rare": 1e-4,
    # Norms kept through four levels of cos^2 + sin^2 and two float32 rotations: 40 * 6e-8.
    "rule_limit_f32": 4e-6,
    # Decode over stored tokens in float32 against float64: a logit is a sum of <= 256 products of
    # order 1/16 with partial sums up to 8 (256 * 0.5 * 6e-8 * 1 at random signs ~ 4e-6), which is
    # also its relative effect on p; the sum over p of one sign adds 1e-6. Three times that.
    "decode_stored": 2e-5,
    # TPU kernel: query times plane weights (of order 2, 3 planes of 128) rounded to units of
    # max / 32639 = 4 * 2 / 32639: 0.3 units * sqrt(400) * 0.09 (scale of logits) * 1.5 = 2e-4 of a
    # logit, which is also relative to p; p times scale to units of 1 / 32639 = 3e-5. Twice.
    "decode_mosaic": 5e-4,
    # A table of numbers up to 3 as a sum of 2**bits float32 terms of that size: 16 * 3 * 6e-8.
    "plane_sums": 3e-6,
    # The same with queries and probabilities cut to 16 bits (two bfloat16, 2**-16 each, one sign):
    # logits off by 2**-16 sum |q k| (<= 4), hence p by 6e-5; the cut of p itself adds 2**-16.
    "decode_triton": 8e-5,
    # Vectors of 16 coordinates times a matrix in two orders: 16 eps of sums up to 16: 1.6e-5.
    "linear_maps": 2e-5,
    # TPU prefill: weights p times scale are rounded to one bfloat16 (2**-8 at most), levels are
    # not: 2**-8 of sum p |v|. With offsets (up to 1.5, |v| averages 0.6) of sum p |v - offset|,
    # which is 3.5 times that.
    "prefill_mosaic": 4e-3,
    "prefill_mosaic_offsets": 1.4e-2,
    # A prompt with queries, levels and weights in one bfloat16 each (1.6e-3 of each, rms): logits
    # of scale 0.2 and 64 products of order 1 err by 0.2 * 8 * 1.6e-3 = 2.6e-3, the largest of 1e4
    # by four times that, which is relative to p and to outputs of order 1; weights add 2**-8.
    "prompt_bfloat16": 2e-2,
    # KL of a plan of 3 bits (errors of about 6 % of what is stored) read with queries, keys,
    # weights and values of one bfloat16 each (2**-9 / sqrt(3), 0.23 % together): 4 % of an error,
    # and KL goes with its square.
    "kl_bfloat16_rel": 8e-2,
    # One bfloat16 each (2**-9): the same sums with random signs, 2**-9 * 4 at most.
    "decode_bfloat16": 8e-3,
    # Exact tokens with every factor two bfloat16 (2**-17) and without the product of the two small
    # parts (2**-18): logits off by 3 * 2**-17 sum |q k| (<= 4) at random signs, 4e-5; p as much.
    "own_pairs": 8e-5,
    # Sums of squares of float32 gradients and errors on tiny models: gradients through 2-3 layers
    # err by ~30 eps of their largest entry, errors x_hat - x by eps |x| / |e| ~ 1e-6, both twice in
    # a square and averaged over thousands of terms.
    "sensitivity_rel": 1e-3,
    # Statistics of two layers whose matrix products (64 terms) are added in another order: 64 eps
    # per product, twice through the layers, twice again in a square: 256 * 6e-8.
    "mesh_sums": 1.6e-5,
    # Share of values in another bin: a shift of 64 eps of a value over a bin of 1/16 of it at
    # least, both bins counted: 2 * 4e-6 * 16; of a few thousand values one may be all of it.
    "mesh_moved": 2e-3,
    # Gradients by two programs, relative to the largest: 64-term sums through 2 layers, there and
    # back, in other orders, each program 4 * 64 * 2^-24 from the truth at worst.
    "model_gradient": 3.06e-5,
    # Moments of such gradients: their relative error twice in a square.
    "gradient_moments": 6.2e-5,
    # A weighted mean in units of the weighted std: float32 sums of 600 terms of which few count
    # (all 262 roundings of 2^-24 alike at worst), and its shift's own rounding 2^-23 of a mean that
    # is nothing to the float64 move.
    "weighted_mean": 1.6e-5,
    # float32 products of 64 terms (2^-24 each, error growing as their root) behind a basis whose
    # condition number reaches 30: 64^0.5 * 6e-8 * 30 = 1.4e-5, of the largest entry.
    "transform_float64": 2e-5,
    # Products of 24 x 24 float64 matrices of condition 1e4, beside the 1e-9 that `fit_basis` adds.
    "transform_joint": 1e-6,
    # Generation on an interpreted kernel that rounds float32 levels to bfloat16 (2^-9 relative), in
    # each of 2 layers, on logits up to 4: 2 * 4 * 2^-9. No code flips.
    "kernel_logits": 1.6e-2,
    # Logits up to 8 of 2 to 7 layers from the same stored bits, in PyTorch and here, or in pieces:
    # each layer's sums differ by 1e-6 (as "decode_f32" of keys and values of order 1).
    "transformers_cache": 2e-5,
    # The same where the last layer's gains are float16: a sum's last bit may round one of them the
    # other way, 2^-11 of a key of weight up to 1 in logits of order 1.
    "transformers_gain": 1e-3,
    # Two orders of summation of 64 float32 products in logits, softmax and output, values up to 4:
    # "attention_f32" without its length.
    "tokamax_f32": 2e-6,
    # Perplexity over that of the unquantized cache, llama.cpp (whose weights meet 8-bit
    # activations, so that most codes of deep layers differ by one) against float32: two draws of
    # the same quantization noise. Over six windows of 512 tokens such draws of 5-bit noise were
    # 0.9 % apart (channels in another order before the rotation); 0.1 to 1.3 % were seen here.
    "llama_cpp_ratio": 1.5e-2,
    # (q - zero) * scale in float64 against two float32 products: 3 roundings of 6e-8.
    "qarray_f32": 2e-7,
    # Mean squared error of a scalar code in float32, values up to 10 with errors of 0.5: 20 * 6e-8
    # twice in a square; a value at a threshold has the same error on both sides.
    "search_error": 1e-5,
    # Solves of 24 x 24 systems of condition <= 400 (skew entries up to 42): 400 * 1e-16 times 24,
    # in float32 400 * 6e-8 times 8. To first order: the second-order term 2 |W|^2, |W| = 1.5e-5.
    "cayley_f64": 1e-12,
    "cayley_f32": 2e-4,
    "cayley_first_order": 1e-9,
    # float32 loss against float64: sums of 64 squares of differences near 1, 100 roundings; a value
    # at a threshold costs the same on both sides, a trellis path that ties nearly so.
    "rotation_loss": 1e-4,
    # Its gradient against central differences at h = 1e-7 in float64 (rounding 1e-16 / h = 1e-9):
    # float32 sums of 200 terms of both signs, over the largest entry.
    "rotation_gradient": 1e-4,
    # A S of float32 matrices of condition up to 10: 16 products of 6e-8 each way.
    "rotated_pair": 2e-5,
    # Encoding in float32: sums of <= 256 products in blocks of 16 or more lanes err by 16 * 6e-8 of
    # |A_j| (|x| + |mean|); gain, division and comparison by a few eps of u.
    "encode_f32": 1e-6,
    # Six of nine products of cut bfloat16 parts (2**-7 and 2**-15 of the whole): the other three
    # are at most 2 * 2**-22 + 2**-30 = 4.8e-7 of a term; 8 roundings of 6e-8 in the sums.
    "split_product": 1e-6,
    # Norms of vectors near 1e-35 in float32 that takes numbers below 1.2e-38 for zero, times the
    # effect of "matched", |u| / |c| at 3 bits: up to 1.1 / sqrt(1 - 0.035) in one vector of 64.
    "encode_tiny": 0.1,
    # Words that differ because one number in some 1e4 lies within 1e-6 of one of <= 15 thresholds
    # (density of numbers times width below 1e-6 each, twice): 0.3 expected; one code is up to 4
    # planes, one differing scale up to 64 signs, of which those within 2**-11 of zero: 0.05.
    "unclear_words": 4,
    # A picture's coordinates have six decimals of points; ratio of bars of more than ten points.
    "drawn": 2e-6,
}
