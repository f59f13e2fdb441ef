// The kernels as a Python module. Tensors arrive as addresses: csrc/__init__.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using namespace fedgs;

namespace {

using Address = uintptr_t;  // 0: no tensor

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

std::pair<int64_t, int64_t> begin_and_end(int64_t index, int64_t size, int64_t n) {
    const Range range = piece(index, size, n);
    return {range.begin, range.end};
}

Masks make_masks(Address masks, Pixel pixel, Address small, int64_t images, int64_t pixels,
                 double log_base, Address area, Address difficulty, Address eta) {
    Masks batch;
    batch.masks = at<void>(masks);
    batch.pixel = pixel;
    batch.small = at<bool>(small);
    batch.images = images;
    batch.pixels = pixels;
    batch.log_base = log_base;
    batch.area = at<int64_t>(area);
    batch.difficulty = at<float>(difficulty);
    batch.eta = at<float>(eta);
    return batch;
}

Step make_step(Address theta, Address grad, Address m, Address v, Address update, Address eta,
               Address t, int64_t n) {
    Step step;
    step.theta = at<float>(theta);
    step.grad = at<float>(grad);
    step.m = at<float>(m);
    step.v = at<float>(v);
    step.update = at<float>(update);
    step.eta = at<float>(eta);
    step.t = at<int64_t>(t);
    step.n = n;
    return step;
}

AdamWOptions make_options(double lr, double beta1, double beta2, double eps, double weight_decay) {
    AdamWOptions options;
    options.lr = lr;
    options.beta1 = beta1;
    options.beta2 = beta2;
    options.eps = eps;
    options.weight_decay = weight_decay;
    return options;
}

Sum make_sum(Address total, const std::vector<Address>& updates, std::vector<float> weights,
             int64_t n, Address out, Address norms) {
    Sum sum;
    sum.total = at<float>(total);
    for (const Address update : updates) sum.updates.push_back(at<float>(update));
    sum.weights = std::move(weights);
    sum.n = n;
    sum.out = at<float>(out);
    sum.norms = at<double>(norms);
    return sum;
}

void adamw_accumulate_on_cpu(const Step& step, const AdamWOptions& options, int threads) {
    adamw_accumulate_cpu(step, adamw_at(*step.t, options), threads);
}

#ifdef FEDGS_CUDA

void mask_difficulty_cuda(const Masks& batch, Address partial, Address ticket, int device,
                          Address stream) {
    cuda::mask_difficulty(batch, at<int>(partial), at<unsigned>(ticket),
                          {device, at<void>(stream)});
}

void adamw_accumulate_cuda(const Step& step, const AdamWOptions& options, int device,
                           Address stream) {
    cuda::adamw_accumulate(step, options, {device, at<void>(stream)});
}

void aggregate_cuda(const Sum& sum, Address partial, int device, Address stream) {
    cuda::aggregate(sum, at<double>(partial), {device, at<void>(stream)});
}

void naive_mask_difficulty(const Masks& batch, int device, Address stream) {
    cuda::naive::mask_difficulty(batch, {device, at<void>(stream)});
}

void naive_adamw_accumulate(const Step& step, const AdamWOptions& options, int device,
                            Address stream) {
    cuda::naive::adamw_accumulate(step, options, {device, at<void>(stream)});
}

void naive_aggregate(const Sum& sum, int device, Address stream) {
    cuda::naive::aggregate(sum, {device, at<void>(stream)});
}

#endif

}  // namespace

PYBIND11_MODULE(_kernels, module) {
    py::enum_<Pixel>(module, "Pixel")
        .value("byte", Pixel::byte)
        .value("float32", Pixel::float32)
        .value("int64", Pixel::int64);

    // Python names every argument of these, so that no address can take another's place.
    py::class_<Masks>(module, "Masks")
        .def(py::init(&make_masks), py::kw_only(), py::arg("masks"), py::arg("pixel"),
             py::arg("small"), py::arg("images"), py::arg("pixels"), py::arg("log_base"),
             py::arg("area"), py::arg("difficulty"), py::arg("eta"));

    py::class_<Step>(module, "Step")
        .def(py::init(&make_step), py::kw_only(), py::arg("theta"), py::arg("grad"), py::arg("m"),
             py::arg("v"), py::arg("update"), py::arg("eta"), py::arg("t"), py::arg("n"));

    py::class_<AdamWOptions>(module, "AdamWOptions")
        .def(py::init(&make_options), py::kw_only(), py::arg("lr"), py::arg("beta1"),
             py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"));

    py::class_<Sum>(module, "Sum")
        .def(py::init(&make_sum), py::kw_only(), py::arg("total"), py::arg("updates"),
             py::arg("weights"), py::arg("n"), py::arg("out"), py::arg("norms"));

    // Other threads of Python may run while a kernel does.
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    module.def("piece", &begin_and_end);
    module.def("mask_difficulty_cpu", &mask_difficulty_cpu, no_gil);
    module.def("adamw_accumulate_cpu", &adamw_accumulate_on_cpu, no_gil);
    module.def("aggregate_cpu", &aggregate_cpu, no_gil);

#ifdef FEDGS_CUDA
    module.attr("AGGREGATE_BLOCKS") = cuda::AGGREGATE_BLOCKS;
    module.def("cuda_problem", &cuda::problem);
    module.def("mask_partials", &cuda::mask_partials);
    module.def("mask_difficulty_cuda", &mask_difficulty_cuda, no_gil);
    module.def("adamw_accumulate_cuda", &adamw_accumulate_cuda, no_gil);
    module.def("aggregate_cuda", &aggregate_cuda, no_gil);
    module.def("naive_mask_difficulty", &naive_mask_difficulty, no_gil);
    module.def("naive_adamw_accumulate", &naive_adamw_accumulate, no_gil);
    module.def("naive_aggregate", &naive_aggregate, no_gil);
#endif
}
