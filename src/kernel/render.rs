//! Renders shader templates: `shaders/*.wgsl` with the numbers of a [`Variant`].

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};

use super::Variant;

macro_rules! templates {
    ($($name:literal),* $(,)?) => { [$(($name, include_str!(concat!("../../shaders/", $name)))),*] };
}

static TEMPLATES: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
    let sources = templates![
        "shared/params.wgsl",
        "shared/unroll.wgsl",
        "shared/address.wgsl",
        "shared/lines.wgsl",
        "shared/tile.wgsl",
        "shared/operands.wgsl",
        "shared/visible.wgsl",
        "shared/pages.wgsl",
        "shared/code.wgsl",
        "shared/score.wgsl",
        "shared/element.wgsl",
        "shared/value.wgsl",
        "shared/normaliser.wgsl",
        "shared/weight.wgsl",
        "shared/weigh.wgsl",
        "shared/finish.wgsl",
        "shared/rotate.wgsl",
        "shared/scores.wgsl",
        "shared/values.wgsl",
        "shared/project.wgsl",
        "shared/merge.wgsl",
        "shared/merge_row.wgsl",
        "scores.wgsl",
        "scores_lanes.wgsl",
        "logits.wgsl",
        "softmax.wgsl",
        "values.wgsl",
        "values_lanes.wgsl",
        "project.wgsl",
        "project_lanes.wgsl",
        "rotary.wgsl",
        "extra.wgsl",
        "append.wgsl",
        "advance.wgsl",
        "average.wgsl",
        "export.wgsl",
        "pack.wgsl",
        "rows.wgsl",
        "flash.wgsl",
        "matrix.wgsl",
        "split.wgsl",
        "merge.wgsl",
        "merge_totals.wgsl",
    ];
    for (name, source) in sources {
        environment.add_template(name, source).unwrap_or_else(|error| panic!("template {name}: {error:#}"));
    }
    environment
});

impl Variant {
    /// The WGSL of the shader.
    pub fn wgsl(&self) -> String {
        let name = format!("{}.wgsl", self.kernel());
        let template = TEMPLATES.get_template(&name).expect("every shader has its template");
        let layout = self.layout();
        let context = context! { params_fields => layout.wgsl(), flags => layout.flags(), ..self.context() };
        template.render(context).unwrap_or_else(|error| panic!("rendering {self}: {error:#}"))
    }
}
