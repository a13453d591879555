// The end of an emulated instance: from a list of pointers to parameters to a call of its kernel.
#pragma once

#include "../cuda/types.cuh"

template <class P>
struct EmulateKind;
template <class T>
struct EmulateKind<T*> {
  static constexpr char value = 'w';  // a pointer to memory that the kernel may write
};
template <class T>
struct EmulateKind<const T*> {
  static constexpr char value = 'r';
};
template <>
struct EmulateKind<int64_t> {
  static constexpr char value = 'i';
};
template <>
struct EmulateKind<float> {
  static constexpr char value = 'f';
};
template <>
struct EmulateKind<TensorMap> {
  static constexpr char value = 'm';
};

template <int... I>
struct EmulateIndices {};
template <int N, int... I>
struct EmulateRange : EmulateRange<N - 1, N - 1, I...> {};
template <int... I>
struct EmulateRange<0, I...> {
  using type = EmulateIndices<I...>;
};

template <class... P, int... I>
__attribute__((no_sanitize("thread"))) void emulate_apply(void (*kernel)(P...), const void* const* parameters,
                                                          EmulateIndices<I...>) {
  kernel(*static_cast<const P*>(parameters[I])...);
}

template <class... P>
__attribute__((no_sanitize("thread"))) void emulate_call_kernel(void (*kernel)(P...), const void* const* parameters) {
  emulate_apply(kernel, parameters, typename EmulateRange<sizeof...(P)>::type());
}

template <class... P>
struct EmulateKinds {
  static constexpr char value[] = {EmulateKind<P>::value..., 0};
};
template <class... P>
const char* emulate_kinds_of(void (*)(P...)) {
  return EmulateKinds<P...>::value;
}

extern "C" {
__attribute__((no_sanitize("thread"))) void emulate_call(const void* const* parameters) {
  emulate_call_kernel(EMULATE_KERNEL, parameters);
}
// One letter per parameter: "w" and "r" pointers, "i" int64_t, "f" float, "m" TensorMap.
const char* emulate_kinds() { return emulate_kinds_of(EMULATE_KERNEL); }
}
