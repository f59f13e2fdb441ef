// The kernels as a Python module. Tensors arrive as addresses: `csrc/__init__.py` has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using namespace fedgs;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Betas = std::pair<double, double>;
using Addresses = std::vector<uintptr_t>;

const float* const* tensors(const Addresses& addresses) { return reinterpret_cast<const float* const*>(addresses.data()); }

}  // namespace

PYBIND11_MODULE(_kernels, module) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();

    py::enum_<Pixel>(module, "Pixel")
        .value("byte", Pixel::byte)
        .value("float32", Pixel::float32)
        .value("int64", Pixel::int64);

    module.def("piece", [](int64_t index, int64_t size, int64_t n) {
        const Range range = piece(index, size, n);
        return std::make_pair(range.begin, range.end);
    });

    module.def("mask_difficulty_cpu", [](uintptr_t masks, Pixel pixel, uintptr_t small, int64_t images, int64_t pixels,
                                         double log_base, uintptr_t area, uintptr_t delta, uintptr_t eta, int threads) {
        mask_difficulty_cpu(at<void>(masks), pixel, at<bool>(small), images, pixels, log_base, at<int64_t>(area),
                            at<float>(delta), at<float>(eta), threads);
    }, no_gil);

    module.def("adamw_accumulate_cpu", [](uintptr_t theta, uintptr_t grad, uintptr_t m, uintptr_t v, uintptr_t delta,
                                          uintptr_t eta, int64_t n, int64_t step, double lr, Betas betas, double eps,
                                          double weight_decay, int threads) {
        adamw_accumulate_cpu(at<float>(theta), at<float>(grad), at<float>(m), at<float>(v), at<float>(delta),
                             at<float>(eta), n, AdamW(step, lr, betas.first, betas.second, eps, weight_decay), threads);
    }, no_gil);

    module.def("aggregate_cpu", [](uintptr_t theta, const Addresses& updates, const std::vector<float>& weights, int64_t n,
                                   uintptr_t out, uintptr_t norms, int threads) {
        aggregate_cpu(at<float>(theta), tensors(updates), weights.data(), int(updates.size()), n, at<float>(out),
                      at<double>(norms), threads);
    }, no_gil);

#ifdef FEDGS_CUDA
    module.attr("AGGREGATE_BLOCKS") = cuda::AGGREGATE_BLOCKS;
    module.def("cuda_problem", &cuda::problem);
    module.def("mask_partials", &cuda::mask_partials);

    module.def("mask_difficulty_cuda", [](uintptr_t masks, Pixel pixel, uintptr_t small, int64_t images, int64_t pixels,
                                          double log_base, uintptr_t area, uintptr_t delta, uintptr_t eta,
                                          uintptr_t partial, uintptr_t ticket, int device, uintptr_t stream) {
        cuda::mask_difficulty(at<void>(masks), pixel, at<bool>(small), images, pixels, log_base, at<int64_t>(area),
                              at<float>(delta), at<float>(eta), at<int>(partial), at<unsigned>(ticket), device,
                              at<void>(stream));
    }, no_gil);

    module.def("adamw_accumulate_cuda", [](uintptr_t theta, uintptr_t grad, uintptr_t m, uintptr_t v, uintptr_t delta,
                                           uintptr_t eta, int64_t n, int64_t step, double lr, Betas betas, double eps,
                                           double weight_decay, int device, uintptr_t stream) {
        cuda::adamw_accumulate(at<float>(theta), at<float>(grad), at<float>(m), at<float>(v), at<float>(delta),
                               at<float>(eta), n, AdamW(step, lr, betas.first, betas.second, eps, weight_decay), device,
                               at<void>(stream));
    }, no_gil);

    module.def("aggregate_cuda", [](uintptr_t theta, const Addresses& updates, const std::vector<float>& weights, int64_t n,
                                    uintptr_t out, uintptr_t norms, uintptr_t partial, int device, uintptr_t stream) {
        cuda::aggregate(at<float>(theta), tensors(updates), weights.data(), int(updates.size()), n, at<float>(out),
                        at<double>(norms), at<double>(partial), device, at<void>(stream));
    }, no_gil);
#endif
}
