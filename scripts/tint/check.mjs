// Asks Tint, the WGSL compiler of Chrome, about every .wgsl file of a folder: node check.mjs FOLDER
//
// The npm package `webgpu` is Dawn, which holds Tint. Its null backend needs no driver, and computes nothing.
import {readdirSync, readFileSync} from 'node:fs';
import {join} from 'node:path';
import {create} from 'webgpu';

const gpu = create(['backend=null']);
const adapter = await gpu.requestAdapter();
const device = await adapter.requestDevice({requiredFeatures: ['shader-f16', 'subgroups']});

// What Tint says about this code, warnings included, and whether Tint refuses the code.
async function verdict(code) {
  device.pushErrorScope('validation');
  const {messages} = await device.createShaderModule({code}).getCompilationInfo();
  const error = await device.popErrorScope();
  return {
    refused: error !== null,
    said: messages.map(({type, lineNum, linePos, message}) => `${lineNum}:${linePos}: ${type}: ${message}`).join('\n'),
  };
}

// A check that accepts everything is none.
const entry = body => `@compute @workgroup_size(1) fn main() { ${body} }`;
if ((await verdict(entry(''))).refused || !(await verdict(entry('let mixed = 1 >= 2 & true;'))).refused) {
  throw new Error('Tint does not tell a right shader from a wrong one here');
}

const folder = process.argv[2];
const files = readdirSync(folder).filter(file => file.endsWith('.wgsl')).sort();
if (files.length === 0) throw new Error(`${folder} holds no .wgsl file`);
let accepted = 0;
for (const file of files) {
  const {refused, said} = await verdict(readFileSync(join(folder, file), 'utf8'));
  if (!refused) accepted += 1;
  if (said) console.log(`${file}: ${said}`);
}
console.log(`Tint accepts ${accepted} of ${files.length} shaders`);
// Dawn keeps node running.
process.exit(accepted < files.length ? 1 : 0);
