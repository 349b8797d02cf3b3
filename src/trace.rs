//! Spans and events for the crate `tracing`. Without the feature of that name a span is nothing, its fields are not even evaluated, and
//! every function here is empty.

/// A span with fields.
macro_rules! span {
    ($name:literal $(, $($field:tt)*)?) => {{
        #[cfg(feature = "tracing")]
        let span = $crate::trace::Span::new(tracing::debug_span!(target: "wgpu_attention", $name $(, $($field)*)?));
        #[cfg(not(feature = "tracing"))]
        let span = $crate::trace::Span;
        span
    }};
}

pub(crate) use span;

pub(crate) use when::{Span, pipeline_cache_ignored, reasons};

#[cfg(feature = "tracing")]
mod when {
    use tracing::{Instrument, debug, warn};
    use web_time::Instant;

    pub(crate) struct Span {
        span: tracing::Span,
        begun: Instant,
    }

    impl Span {
        pub(crate) fn new(span: tracing::Span) -> Self {
            Span { span, begun: Instant::now() }
        }

        /// Runs a function within the span.
        pub(crate) fn within<T>(&self, call: impl FnOnce() -> T) -> T {
            self.span.in_scope(call)
        }

        /// Runs a future within the span, whenever it is polled.
        pub(crate) fn around<F: Future>(self, call: F) -> impl Future<Output = F::Output> + use<F> {
            call.instrument(self.span)
        }

        /// Writes the time since the span began into its field `milliseconds`.
        pub(crate) fn time(&self) {
            self.span.record("milliseconds", self.begun.elapsed().as_secs_f64() * 1e3);
        }
    }

    /// An event for each reason of a plan.
    pub(crate) fn reasons(reasons: &[String]) {
        reasons.iter().for_each(|reason| debug!(target: "wgpu_attention", "{reason}"));
    }

    pub(crate) fn pipeline_cache_ignored(why: &str) {
        warn!(target: "wgpu_attention", "the pipeline cache is ignored: {why}");
    }
}

#[cfg(not(feature = "tracing"))]
mod when {
    pub(crate) struct Span;

    impl Span {
        pub(crate) fn within<T>(&self, call: impl FnOnce() -> T) -> T {
            call()
        }

        pub(crate) fn around<F: Future>(self, call: F) -> F {
            call
        }

        pub(crate) fn time(&self) {}
    }

    pub(crate) fn reasons(_: &[String]) {}

    pub(crate) fn pipeline_cache_ignored(_: &str) {}
}
