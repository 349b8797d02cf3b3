//! What the library tells the subscribers of the crate `tracing`.

#[path = "support/mod.rs"]
mod support;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use support::{Case, gpus};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use wgpu_attention::{Caps, Options, Plan, Problem, wgpu};

/// The fields of a span or an event.
#[derive(Clone, Debug, Default)]
struct Fields(Vec<(String, String)>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push((field.name().into(), format!("{value:?}").trim_matches('"').into()));
    }
}

impl Fields {
    fn get(&self, name: &str) -> &str {
        &self.0.iter().find(|(field, _)| field == name).unwrap_or_else(|| panic!("no {name} in {self:?}")).1
    }
}

#[derive(Clone, Debug)]
enum Told {
    Span { id: u64, name: &'static str, parent: Option<&'static str>, fields: Fields },
    Event { level: Level, within: Option<&'static str>, message: String },
}

/// Keeps what it is told.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Vec<Told>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Listener {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let span = context.span(id).unwrap();
        let (name, parent) = (span.name(), span.parent().map(|parent| parent.name()));
        assert_eq!(span.metadata().target(), "wgpu_attention");
        self.0.lock().unwrap().push(Told::Span { id: id.into_u64(), name, parent, fields });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        for told in self.0.lock().unwrap().iter_mut().rev() {
            if let Told::Span { id: own, fields, .. } = told
                && *own == id.into_u64()
            {
                return values.record(fields);
            }
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let within = context.event_span(event).map(|span| span.name());
        let message = fields.get("message").to_owned();
        self.0.lock().unwrap().push(Told::Event { level: *event.metadata().level(), within, message });
    }
}

/// What a call tells on this thread.
fn told<T>(call: impl FnOnce() -> T) -> (T, Vec<Told>) {
    let listener = Listener::default();
    let kept = listener.0.clone();
    let guard = tracing_subscriber::registry().with(listener).set_default();
    let result = call();
    drop(guard);
    let told = kept.lock().unwrap().clone();
    (result, told)
}

/// The spans of a name: the name of the span around each, and its fields.
fn spans(told: &[Told], wanted: &str) -> Vec<(Option<&'static str>, Fields)> {
    let span = |told: &Told| match told {
        Told::Span { name, parent, fields, .. } if *name == wanted => Some((*parent, fields.clone())),
        _ => None,
    };
    told.iter().filter_map(span).collect()
}

#[test]
fn a_plan_is_a_span_with_an_event_for_each_reason() {
    let problem = Problem::new(2, 8, 77, 99, 64);
    let caps = Caps::new(wgpu::Limits::default());
    let (plan, told) = told(|| Plan::new(&problem.check().unwrap(), &caps, &Options::default()).unwrap());
    let [(None, fields)] = &spans(&told, "plan")[..] else { panic!("{told:?}") };
    assert_eq!([fields.get("operation"), fields.get("seq_kv"), fields.get("element")], ["attention", "99", "f32"]);
    let reasons: Vec<&String> = told
        .iter()
        .filter_map(|told| match told {
            Told::Event { level: Level::DEBUG, within: Some("plan"), message } => Some(message),
            _ => None,
        })
        .collect();
    assert!(reasons.iter().any(|reason| reason.starts_with("kernel flash: ")), "{reasons:?}");
    assert_eq!(reasons, plan.reasons().iter().collect::<Vec<_>>());
}

#[test]
fn prepare_encode_and_run_are_spans_and_each_pipeline_has_its_compile_time() {
    let case = Case::random(Problem::new(1, 2, 7, 9, 16), 1);
    for gpu in gpus() {
        let gpu = gpu.limited(|_| ());
        let plan = gpu.library().plan(&case.problem).unwrap();
        let (prepared, first) = told(|| gpu.library().prepare(&plan).unwrap());
        let [(None, fields)] = &spans(&first, "prepare")[..] else { panic!("{first:?}") };
        assert_eq!(fields.get("dispatches"), plan.dispatches().to_string());
        let pipelines = spans(&first, "pipeline");
        assert_eq!(pipelines.len(), gpu.library().compiled_pipelines());
        for (parent, fields) in &pipelines {
            assert_eq!(*parent, Some("prepare"));
            assert!(plan.steps().iter().any(|step| step.variant.to_string() == fields.get("variant")), "{fields:?}");
            assert!(fields.get("milliseconds").parse::<f64>().unwrap() > 0.0, "{fields:?}");
        }
        // What is compiled is not compiled again.
        let (_, second) = told(|| gpu.library().prepare(&plan).unwrap());
        assert_eq!((spans(&second, "prepare").len(), spans(&second, "pipeline").len()), (1, 0));

        let resident = gpu.upload(&plan, &case.operands.inputs()).unwrap();
        let ((), run) = told(|| gpu.run(&prepared, &resident, &mut |_, _| ()).unwrap());
        let [(None, fields)] = &spans(&run, "run")[..] else { panic!("{run:?}") };
        assert_eq!(fields.get("slices"), plan.slices().to_string());
        let encoded = spans(&run, "encode");
        assert_eq!(encoded.len(), plan.slices());
        for (parent, fields) in &encoded {
            assert_eq!(*parent, Some("run"));
            assert!(fields.get("pass").starts_with("attention: "), "{fields:?}");
        }
        case.compare(&gpu.download(&plan, &resident).unwrap(), &plan);
    }
}

#[test]
fn operations_are_planned_and_prepared_in_spans() {
    let append = wgpu_attention::operations::Append::new(1, 2, 1, 8, 4);
    for gpu in gpus() {
        let (_, told) = told(|| gpu.library().append(&append, &Options::default()).unwrap());
        for name in ["plan", "prepare"] {
            let [(None, fields)] = &spans(&told, name)[..] else { panic!("{told:?}") };
            assert_eq!(fields.get("operation"), "append");
        }
    }
}

#[test]
fn a_pipeline_cache_that_is_ignored_is_a_warning() {
    for gpu in gpus() {
        let mut gpu = gpu.limited(|_| ());
        // SAFETY: the data has a wrong checksum, so that no driver gets it.
        let (used, told) = told(|| unsafe { gpu.library_mut().load_pipeline_cache(&[7; 9]) });
        assert!(!used);
        let [Told::Event { level: Level::WARN, message, .. }] = &told[..] else { panic!("{told:?}") };
        assert_eq!(message, "the pipeline cache is ignored: its data is damaged");
    }
}
